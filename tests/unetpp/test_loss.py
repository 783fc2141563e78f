"""The loss against its formula."""

import numpy as np
import pytest
import torch

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
