"""The network against the paper: its graph, its sizes, its costs, its reach."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.model import Grid, UNetPlusPlus, count_gmacs, count_parameters, node_name
from unetpp.prune import prune
from unetpp.weights import kmacs_per_pixel

NARROW = (4, 6, 8, 10, 12)
UPSAMPLES = ("deconv", "nearest", "bilinear")
NORMS = ("batch", "none")


def test_parameters_are_the_papers() -> None:
    model = UNetPlusPlus(ModelConfig(in_channels=1, norm="none"))
    counts = [count_parameters(prune(model, level)) for level in (1, 2, 3, 4)]
    assert counts == [100_961, 511_105, 2_204_961, 9_041_601]


@pytest.mark.parametrize(
    ("upsample", "expected"),
    [
        ("deconv", [101_793, 512_385, 2_207_201, 9_045_825]),
        ("bilinear", [102_785, 518_401, 2_234_497, 9_159_681]),
        ("nearest", [102_785, 518_401, 2_234_497, 9_159_681]),
    ],
)
def test_parameters_with_batch_norm_and_colour(upsample: str, expected: list[int]) -> None:
    model = UNetPlusPlus(ModelConfig(upsample=upsample))
    assert [count_parameters(prune(model, level)) for level in (1, 2, 3, 4)] == expected


def test_multiply_adds_at_256_pixels() -> None:
    gmacs = [count_gmacs(ModelConfig(level=level, deep_supervision=False), 256, 256) for level in (1, 2, 3, 4)]
    assert gmacs == pytest.approx([3.5148, 8.9171, 17.4735, 29.7879], abs=1e-4)


@pytest.mark.parametrize("upsample", UPSAMPLES)
def test_multiply_adds_by_the_shapes_of_the_weights_are_those_that_torch_counts(upsample: str) -> None:
    config = ModelConfig(level=3, filters=(8, 24, 16, 40), upsample=upsample, num_classes=3, in_channels=5)
    assert kmacs_per_pixel(config) * 64 * 96 / 1e6 == pytest.approx(count_gmacs(config, 64, 96), rel=1e-6)


@pytest.mark.parametrize(("norm", "upsample"), list(itertools.product(NORMS, UPSAMPLES)))
def test_forward_is_equation_one(norm: str, upsample: str) -> None:
    """Recompute every node by the paper's recursion, with the same weights, and compare the deepest head."""
    model = UNetPlusPlus(ModelConfig(filters=NARROW, norm=norm, upsample=upsample)).eval()
    x = torch.rand(2, 3, 48, 32)

    def node(i: int, j: int) -> Tensor:
        if j == 0:
            inputs = (x - model.mean) / model.std if i == 0 else F.max_pool2d(node(i - 1, 0), 2)
        else:
            inputs = torch.cat([node(i, k) for k in range(j)] + [model.ups[node_name(i, j)](node(i + 1, j - 1))], 1)
        return model.nodes[node_name(i, j)](inputs)

    with torch.no_grad():
        logits = model(x)
        for level in (1, 2, 3, 4):
            torch.testing.assert_close(logits[level], model.heads[str(level)](node(0, level)))


def test_stopping_the_steps_early_gives_the_shallow_head() -> None:
    model = UNetPlusPlus(ModelConfig(filters=NARROW)).eval()
    x = torch.rand(1, 3, 32, 32)
    grid: Grid = {}
    with torch.no_grad():
        for depth in range(3):
            model.step(depth, grid, (x - model.mean) / model.std)
        assert torch.equal(model.heads["2"](grid[0, 2]), model(x)[2])
    assert set(grid) == {(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)}


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (17, 3), (97, 100), (64, 64)])
def test_any_size_comes_back_at_its_own_size(size: tuple[int, int]) -> None:
    model = UNetPlusPlus(ModelConfig(filters=NARROW, num_classes=3)).eval()
    logits = model(torch.rand(2, 3, *size))
    assert {level: tuple(head.shape) for level, head in logits.items()} == dict.fromkeys((1, 2, 3, 4), (2, 3, *size))


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_every_parameter_gets_a_gradient(level: int, deep_supervision: bool) -> None:
    """Nothing unused is built: distributed training needs no search for unused parameters."""
    model = UNetPlusPlus(ModelConfig(level=level, filters=NARROW, deep_supervision=deep_supervision))
    logits = model(torch.rand(2, 3, 32, 32))
    assert list(logits) == (list(range(1, level + 1)) if deep_supervision else [level])
    sum(head.square().mean() for head in logits.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("level", "upsample"), list(itertools.product((1, 2, 3, 4), UPSAMPLES)))
def test_reach_is_exact(level: int, upsample: str) -> None:
    """A changed pixel changes outputs up to `reach_px` away for some position of it, and never farther."""
    config = ModelConfig(level=level, filters=NARROW, norm="none", upsample=upsample, deep_supervision=False)
    # All-positive weights and no bias: no ReLU hides a change, and changes only add up.
    model = UNetPlusPlus(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                parameter.abs() / parameter.abs().sum(dim=tuple(range(1, parameter.ndim)), keepdim=True).clamp(min=1e-9)
                if parameter.ndim > 1
                else torch.zeros_like(parameter)
            )
    stride, reach = config.stride, config.reach_px
    side = -(-(2 * reach + 2 * stride) // 16) * 16
    farthest = 0
    for phase in range(stride):
        position = side // 2 // stride * stride + phase
        image = torch.full((1, 3, 16, side), 0.6, dtype=torch.float64)
        changed = image.clone()
        changed[..., position] += 0.3
        with torch.no_grad():
            difference = (model(changed)[level] - model(image)[level]).abs().amax((0, 1, 2))
        touched = difference.nonzero().flatten()
        farthest = max(farthest, int((touched - position).abs().max()))
    assert farthest == reach


def test_a_wrong_shape_names_the_wanted_one() -> None:
    model = UNetPlusPlus(ModelConfig(filters=NARROW))
    with pytest.raises(ConfigError, match=r"\(2, 1, 16, 16\); wanted B, 3, H, W"):
        model(torch.rand(2, 1, 16, 16))


@pytest.mark.parametrize("is_frozen", [False, True])
def test_computing_nodes_twice_changes_no_gradient_and_no_statistic(is_frozen: bool) -> None:
    x = torch.rand(2, 3, 32, 32)
    models = []
    for recompute in (False, True):
        torch.manual_seed(5)
        model = UNetPlusPlus(ModelConfig(level=3, filters=NARROW)).train()
        model.recompute = recompute
        for layer in model.modules():
            if is_frozen and isinstance(layer, torch.nn.BatchNorm2d):
                layer.eval()
        sum(head.square().mean() for head in model(x).values()).backward()
        models.append(model)
    kept, twice = models
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name
        assert not name.endswith("num_batches_tracked") or tensor == (not is_frozen), name
    for (name, one), (_, two) in zip(kept.named_parameters(), twice.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)
