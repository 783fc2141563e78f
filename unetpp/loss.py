"""The training loss: 1/2 cross-entropy + soft Dice at every head (Zhou et al. 2018, equation 3).

The paper prints only the y log p half of the cross-entropy; its code, and this one, use both halves. Sums over pixels
run in float32 whatever the autocast type: half precision overflows at 65,504.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unetpp.config import IGNORE

SMOOTH = 1.0
"""Added to both sides of the Dice fraction, so that an empty target asks for an empty mask and divides by no zero."""


def segmentation_loss(logits_BKHW: Tensor, target_BHW: Tensor, class_weights: Sequence[float] | None = None) -> Tensor:
    """Mean over images of 1/2 cross-entropy + 1 - soft Dice over the labelled pixels; a scalar >= 0.

    K = 1: `target_BHW` in {0, 1}, sigmoid. K >= 2: class ids 0..K-1, softmax, Dice averaged over classes.
    `class_weights` (K of them, for K = 1 two: background, foreground) weigh the cross-entropy's pixels by their class.
    """
    logits_BKHW = logits_BKHW.float()
    labelled_B1HW = (target_BHW != IGNORE).unsqueeze(1)
    class_BHW = torch.where(target_BHW == IGNORE, 0, target_BHW).long()
    if logits_BKHW.shape[1] == 1:
        target_BKHW = class_BHW.unsqueeze(1).float()
        cross_entropy_BHW = F.binary_cross_entropy_with_logits(logits_BKHW, target_BKHW, reduction="none")[:, 0]
        probability_BKHW = logits_BKHW.sigmoid()
    else:
        target_BKHW = F.one_hot(class_BHW, logits_BKHW.shape[1]).permute(0, 3, 1, 2).float()
        cross_entropy_BHW = F.cross_entropy(logits_BKHW, class_BHW, reduction="none")
        probability_BKHW = logits_BKHW.softmax(1)
    weight_BHW = labelled_B1HW[:, 0].float()
    if class_weights is not None:
        weight_BHW = weight_BHW * torch.tensor(class_weights, device=weight_BHW.device)[class_BHW]
    cross_entropy_B = _mean_of_images(cross_entropy_BHW, weight_BHW)
    probability_BKHW, target_BKHW = probability_BKHW * labelled_B1HW, target_BKHW * labelled_B1HW
    overlap_BK = (probability_BKHW * target_BKHW).sum((2, 3))
    size_BK = probability_BKHW.sum((2, 3)) + target_BKHW.sum((2, 3))
    dice_BK = (2 * overlap_BK + SMOOTH) / (size_BK + SMOOTH)
    return (0.5 * cross_entropy_B + 1 - dice_BK.mean(1)).mean()


def distillation_loss(logits_BKHW: Tensor, teacher_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Cross-entropy of a head's probabilities against the teacher's (Hinton et al. 2015, T = 1).

    Mean over images of the mean over the labelled pixels: of the others the teacher was taught nothing either.
    """
    logits_BKHW = logits_BKHW.float()
    if logits_BKHW.shape[1] == 1:
        loss_BHW = F.binary_cross_entropy_with_logits(logits_BKHW, teacher_BKHW, reduction="none")[:, 0]
    else:
        loss_BHW = F.cross_entropy(logits_BKHW, teacher_BKHW, reduction="none")
    return _mean_of_images(loss_BHW, (target_BHW != IGNORE).float()).mean()


def _mean_of_images(loss_BHW: Tensor, weight_BHW: Tensor) -> Tensor:
    """Weighted mean over the pixels of each image; 0 where none has a weight."""
    return (loss_BHW * weight_BHW).sum((1, 2)) / weight_BHW.sum((1, 2)).clamp(min=1e-6)


def deep_supervision_loss(
    logits: Mapping[int, Tensor],
    target_BHW: Tensor,
    weights: Mapping[int, float] | None = None,
    *,
    class_weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    teacher: Literal["deepest", "mean"] = "deepest",
) -> Tensor:
    """Sum over the heads of weight x `segmentation_loss`; weights are keyed by level, default 1.

    With `distillation` d in 0..1 the loss of every head but the deepest becomes (1 - d) x that + d x its
    `distillation_loss` against the probabilities of the deepest head, or the mean ones of all heads. The teacher is
    not trained by it.
    """
    deepest = max(logits)
    teacher_BKHW = _probabilities(logits, teacher) if distillation > 0 and len(logits) > 1 else None
    losses = []
    for level, head_BKHW in logits.items():
        loss = segmentation_loss(head_BKHW, target_BHW, class_weights)
        if teacher_BKHW is not None and level != deepest:
            loss = (1 - distillation) * loss + distillation * distillation_loss(head_BKHW, teacher_BKHW, target_BHW)
        losses.append((weights[level] if weights else 1.0) * loss)
    return torch.stack(losses).sum()


@torch.no_grad()
def _probabilities(logits: Mapping[int, Tensor], teacher: str) -> Tensor:
    chosen = [logits[max(logits)]] if teacher == "deepest" else list(logits.values())
    each = [head.float().sigmoid() if head.shape[1] == 1 else head.float().softmax(1) for head in chosen]
    return torch.stack(each).mean(0)
