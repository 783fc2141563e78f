"""The loss against its formula."""

from typing import Literal

import numpy as np
import pytest
import torch

from unetpp.config import IGNORE
from unetpp.loss import deep_supervision_loss, segmentation_loss


def test_binary_loss_is_half_cross_entropy_plus_soft_dice() -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(3, 1, 5, 7)), rng.random((3, 5, 7)) > 0.6
    expected = []
    for z, y in zip(logits[:, 0], target, strict=True):
        p = 1 / (1 + np.exp(-z))
        cross_entropy = -np.mean(np.where(y, np.log(p), np.log(1 - p)))
        dice = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        expected.append(0.5 * cross_entropy + 1 - dice)
    loss = segmentation_loss(torch.from_numpy(logits), torch.from_numpy(target))
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-6)


def test_loss_of_an_image_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(4, 1, 8, 8), torch.rand(4, 8, 8) > 0.5
    alone = torch.stack([segmentation_loss(logits[n : n + 1], target[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(segmentation_loss(logits, target), alone.mean())


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_perfect_mask_costs_nothing_and_an_empty_target_is_finite(num_classes: int) -> None:
    target = torch.zeros(2, 6, 6, dtype=torch.uint8)
    target[0, :3] = 1
    if num_classes == 1:
        logits = (40.0 * target - 20).unsqueeze(1)
    else:
        logits = 40.0 * torch.nn.functional.one_hot(target.long(), 3).permute(0, 3, 1, 2)
    assert segmentation_loss(logits, target).item() == pytest.approx(0, abs=1e-4)
    assert segmentation_loss(-logits, target).item() > 0.9


def test_half_precision_sums_do_not_overflow() -> None:
    logits = torch.full((1, 1, 512, 512), 8.0, dtype=torch.float16)
    loss = segmentation_loss(logits, torch.ones(1, 512, 512, dtype=torch.uint8))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0, abs=1e-3)


def test_head_weights_are_keyed_by_level() -> None:
    torch.manual_seed(0)
    target = torch.rand(2, 8, 8) > 0.5
    logits = {level: torch.randn(2, 1, 8, 8) for level in (1, 2, 3)}
    each = {level: segmentation_loss(head, target) for level, head in logits.items()}
    torch.testing.assert_close(deep_supervision_loss(logits, target), each[1] + each[2] + each[3])
    weighted = deep_supervision_loss(logits, target, {3: 4.0, 1: 0.5, 2: 1.0})
    torch.testing.assert_close(weighted, 0.5 * each[1] + each[2] + 4 * each[3])


@pytest.mark.parametrize("num_classes", [1, 3])
def test_pixels_that_are_not_labelled_change_nothing(num_classes: int) -> None:
    torch.manual_seed(1)
    target = torch.randint(0, max(2, num_classes), (2, 8, 12), dtype=torch.uint8)
    logits = torch.randn(2, num_classes, 8, 12)
    half_labelled = target.clone()
    half_labelled[:, :, 6:] = IGNORE
    left = segmentation_loss(logits[..., :6], target[..., :6])
    torch.testing.assert_close(segmentation_loss(logits, half_labelled), left)
    nothing = segmentation_loss(logits.requires_grad_(), torch.full_like(target, IGNORE))
    nothing.backward()
    assert nothing.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_teacher_is_not_heard_where_it_was_taught_nothing(num_classes: int) -> None:
    torch.manual_seed(4)
    target = torch.randint(0, max(2, num_classes), (2, 8, 12), dtype=torch.uint8)
    logits = {level: torch.randn(2, num_classes, 8, 12, requires_grad=True) for level in (1, 2)}
    target[0, :, 6:], target[1, :, 3:] = IGNORE, IGNORE
    alone = [
        deep_supervision_loss(
            {level: head[n : n + 1, ..., :kept] for level, head in logits.items()},
            target[n : n + 1, :, :kept],
            distillation=0.3,
        )
        for n, kept in enumerate((6, 3))
    ]
    loss = deep_supervision_loss(logits, target, distillation=0.3)
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    nothing = deep_supervision_loss(logits, torch.full_like(target, IGNORE), distillation=0.3)
    gradients = torch.autograd.grad(nothing, list(logits.values()))
    assert not any(each.any() for each in gradients)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_class_weights_weigh_the_pixels_of_the_cross_entropy(num_classes: int) -> None:
    torch.manual_seed(2)
    weights = [0.5, 2.0, 7.0][: max(2, num_classes)]
    target = torch.randint(0, len(weights), (1, 6, 6))
    logits = torch.randn(1, num_classes, 6, 6)
    both = torch.cat([-logits, logits], 1) / 2 if num_classes == 1 else logits  # a sigmoid is a softmax of two
    weighted = torch.nn.functional.cross_entropy(both, target, torch.tensor(weights))
    plain = torch.nn.functional.cross_entropy(both, target)
    difference = segmentation_loss(logits, target, weights) - segmentation_loss(logits, target)
    torch.testing.assert_close(difference, 0.5 * (weighted - plain))


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("teacher", ["deepest", "mean"])
def test_distillation_pulls_shallow_heads_to_the_teacher_and_leaves_the_teacher_alone(
    num_classes: int, teacher: Literal["deepest", "mean"]
) -> None:
    torch.manual_seed(3)
    target = torch.randint(0, max(2, num_classes), (2, 6, 6))
    logits = {level: torch.randn(2, num_classes, 6, 6, requires_grad=True) for level in (1, 2, 3)}
    each = {level: segmentation_loss(head, target) for level, head in logits.items()}

    def probability(head: torch.Tensor) -> torch.Tensor:
        return head.sigmoid() if num_classes == 1 else head.softmax(1)

    heads = [logits[3]] if teacher == "deepest" else list(logits.values())
    taught = torch.stack([probability(head) for head in heads]).mean(0).detach()
    soft = {}
    for level in (1, 2):
        p = probability(logits[level])
        entropy = -(taught * p.log() + (1 - taught) * (1 - p).log()) if num_classes == 1 else -(taught * p.log()).sum(1)
        soft[level] = entropy.mean()
    expected = each[3] + sum(0.7 * each[level] + 0.3 * soft[level] for level in (1, 2))
    loss = deep_supervision_loss(logits, target, distillation=0.3, teacher=teacher)
    torch.testing.assert_close(loss, expected)
    (alone,) = torch.autograd.grad(each[3], logits[3], retain_graph=True)
    (together,) = torch.autograd.grad(loss, logits[3])
    torch.testing.assert_close(together, alone)
