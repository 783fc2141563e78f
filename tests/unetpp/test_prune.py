"""Pruning changes nothing but what is computed."""

import itertools

import pytest
import torch

from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.loss import deep_supervision_loss
from unetpp.model import UNetPlusPlus
from unetpp.prune import prune

VARIANTS = list(itertools.product(("batch", "none"), ("deconv", "nearest", "bilinear")))


def trained(norm: str, upsample: str) -> UNetPlusPlus:
    """A model after a few steps: BatchNorm statistics and every weight are away from their start."""
    torch.manual_seed(0)
    model = UNetPlusPlus(ModelConfig(filters=(8, 12, 16, 24, 32), norm=norm, upsample=upsample))
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        loss = deep_supervision_loss(model(torch.rand(2, 3, 32, 32)), torch.rand(2, 32, 32) > 0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@pytest.mark.parametrize(("norm", "upsample"), VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (96, 80), (37, 51), (1, 1)])
def test_pruned_level_equals_its_head(norm: str, upsample: str, size: tuple[int, int]) -> None:
    model = trained(norm, upsample).eval()
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        whole = model(x)
        for level in (1, 2, 3, 4):
            pruned = prune(model, level)(x)
            assert list(pruned) == [level]
            assert torch.equal(pruned[level], whole[level])


@pytest.mark.parametrize(("norm", "upsample"), VARIANTS)
def test_pruned_level_equals_its_head_in_training_mode(norm: str, upsample: str) -> None:
    model = trained(norm, upsample).train()
    x = torch.rand(2, 3, 64, 64)
    pruned = {level: prune(model, level) for level in (1, 2, 3, 4)}
    whole = model(x)
    for level, network in pruned.items():
        assert network.training
        assert torch.equal(network(x)[level], whole[level])


def test_pruning_twice_is_pruning_once() -> None:
    model = trained("batch", "deconv").eval()
    once = prune(model, 2)
    twice = prune(prune(model, 3, keep_heads=True), 2)
    assert once.config == twice.config
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_pruning_shares_no_weights_with_the_model() -> None:
    model = trained("batch", "deconv").eval()
    pruned = prune(model, 1)
    before = pruned.nodes["x00"][0].weight.clone()
    with torch.no_grad():
        model.nodes["x00"][0].weight.zero_()
    assert torch.equal(pruned.nodes["x00"][0].weight, before)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_unsupervised_head_is_refused(level: int) -> None:
    model = UNetPlusPlus(ModelConfig(filters=(4, 4, 4, 4, 4), deep_supervision=False))
    with pytest.raises(ConfigError, match=rf"level {level} has no supervised head .* levels \[4\]"):
        prune(model, level)
