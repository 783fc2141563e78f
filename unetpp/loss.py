"""The training loss: 1/2 cross-entropy + soft Dice at every head (Zhou et al. 2018, equation 3).

The paper prints only the y log p half of the cross-entropy; its code, and this one, use both halves. Sums over pixels
run in float32 whatever the autocast type: half precision overflows at 65,504.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1.0
"""Added to both sides of the Dice fraction, so that an empty target asks for an empty mask and divides by no zero."""


def segmentation_loss(logits_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
    """Mean over images of 1/2 cross-entropy + 1 - soft Dice; a scalar >= 0.

    K = 1: `target_BHW` in {0, 1}, sigmoid. K >= 2: class ids 0..K-1, softmax, Dice averaged over classes.
    """
    logits_BKHW = logits_BKHW.float()
    if logits_BKHW.shape[1] == 1:
        target_BKHW = target_BHW.unsqueeze(1).float()
        cross_entropy_B = F.binary_cross_entropy_with_logits(logits_BKHW, target_BKHW, reduction="none").mean((1, 2, 3))
        probability_BKHW = logits_BKHW.sigmoid()
    else:
        cross_entropy_B = F.cross_entropy(logits_BKHW, target_BHW.long(), reduction="none").mean((1, 2))
        target_BKHW = F.one_hot(target_BHW.long(), logits_BKHW.shape[1]).permute(0, 3, 1, 2).float()
        probability_BKHW = logits_BKHW.softmax(1)
    overlap_BK = (probability_BKHW * target_BKHW).sum((2, 3))
    size_BK = probability_BKHW.sum((2, 3)) + target_BKHW.sum((2, 3))
    dice_BK = (2 * overlap_BK + SMOOTH) / (size_BK + SMOOTH)
    return (0.5 * cross_entropy_B + 1 - dice_BK.mean(1)).mean()


def deep_supervision_loss(
    logits: Mapping[int, Tensor], target_BHW: Tensor, weights: Mapping[int, float] | None = None
) -> Tensor:
    """Sum over the heads of weight x `segmentation_loss`; weights are keyed by level, default 1."""
    losses = [
        (weights[level] if weights else 1.0) * segmentation_loss(head_BKHW, target_BHW)
        for level, head_BKHW in logits.items()
    ]
    return torch.stack(losses).sum()
