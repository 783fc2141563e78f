"""UNet++: nested U-Nets joined by dense skip pathways (Zhou et al., DLMIA 2018, arXiv 1807.10165, section 3).

Node X^{i,j} lies at depth i (stride 2**i) and position j of its dense skip pathway:

    X^{i,0} = H(pool(X^{i-1,0}))                            X^{0,0} = H(x)
    X^{i,j} = H([X^{i,0}, ..., X^{i,j-1}, U(X^{i+1,j-1})])   j >= 1      (equation 1; skips first, upsampled last)

H is twice (3x3 convolution, norm, ReLU), U an upsampling by 2. A head is a 1x1 convolution on X^{0,L}: pruning level L.
Written from the equations alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.weights import node_name

Grid = dict[tuple[int, int], Tensor]
"""Computed nodes: (i, j) -> X^{i,j} of shape B, filters[i], H / 2**i, W / 2**i."""


class FileValues(nn.Conv2d):
    """The convolution that reads an image: in float32 also under autocast, whose type what follows gets.

    In the 8 bits of bfloat16, all that a dim image of 16 bits shows may be less than a step away from black.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B, in_channels, H, W -> B, out_channels, H, W."""
        device = x_BCHW.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return super().forward(x_BCHW)
        with torch.autocast(device, enabled=False):
            found_BCHW = super().forward(x_BCHW.float())
        return found_BCHW.to(torch.get_autocast_dtype(device))


class Node(nn.Sequential):
    """H(.): twice 3x3 convolution, norm, ReLU; B, in_channels, H, W -> B, out_channels, H, W."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, *, is_first: bool = False) -> None:
        layers: list[nn.Module] = []
        for channels, kind in ((in_channels, FileValues if is_first else nn.Conv2d), (out_channels, nn.Conv2d)):
            layers.append(kind(channels, out_channels, 3, padding=1, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


def _upsampler(in_channels: int, out_channels: int, upsample: str) -> nn.Module:
    if upsample == "deconv":
        return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
    # align_corners=True would tie the sampling grid to the tile's size: tiles could never equal the whole image.
    return nn.Upsample(scale_factor=2, mode=upsample, align_corners=False if upsample == "bilinear" else None)


class UNetPlusPlus(nn.Module):
    """UNet++ of `config.level` with its heads keyed by level.

    Only what the heads need is built, so every parameter gets a gradient when every head has a loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """In training, compute the inside of the nodes twice instead of keeping it for the backward pass."""
        filters = config.filters
        self.nodes = nn.ModuleDict()
        self.ups = nn.ModuleDict()
        for i, j in config.nodes:
            if j > 0:
                self.ups[node_name(i, j)] = _upsampler(filters[i + 1], filters[i], config.upsample)
            channels, is_first = config.node_channels(i, j), (i, j) == (0, 0)
            self.nodes[node_name(i, j)] = Node(channels, filters[i], config.norm, is_first=is_first)
        self.heads = nn.ModuleDict(
            {str(level): nn.Conv2d(filters[0], config.num_classes, 1) for level in config.head_levels}
        )
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.apply(_init_weights)

    def step(self, depth: int, grid: Grid, x_BCHW: Tensor | None = None) -> None:
        """Add the anti-diagonal i + j = depth to `grid`, which holds all nodes before it.

        Step 0 reads `x_BCHW`, normalised and padded to a multiple of the stride. Steps 0..level in turn are `forward`;
        stopping early at step L leaves the sub-network of level L.
        """
        for j in range(depth + 1):
            i = depth - j
            if j > 0:
                skips = [grid[i, k] for k in range(j)]
                inputs = torch.cat([*skips, self.ups[node_name(i, j)](grid[i + 1, j - 1])], dim=1)
            elif i > 0:
                inputs = F.max_pool2d(grid[i - 1, 0], 2)
            else:
                assert x_BCHW is not None
                inputs = x_BCHW
            node = self.nodes[node_name(i, j)]
            grid[i, j] = _recomputed(node, inputs) if self.recompute and self.training else node(inputs)

    def forward(self, x_BCHW: Tensor) -> dict[int, Tensor]:
        """Logits of every head.

        `x_BCHW`: values in 0..1 (see `ModelConfig.value_range`), any H, W >= 1; padded and cropped here.
        Returns level -> logits_BKHW, K = num_classes (one logit for a binary mask). ConfigError on another shape.
        """
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.config.in_channels:
            raise ConfigError(
                f"the input has shape {tuple(x_BCHW.shape)}; wanted B, {self.config.in_channels}, H, W "
                f"(in_channels={self.config.in_channels})"
            )
        height, width = x_BCHW.shape[-2:]
        heads = self.heads_of(self._pad(x_BCHW))
        return {level: logits_BKHW[..., :height, :width] for level, logits_BKHW in heads.items()}

    def heads_of(self, x_BCHW: Tensor) -> dict[int, Tensor]:
        """As `forward`, without padding: H and W are multiples of `ModelConfig.stride`.

        What is computed for a tile, whose outer box ends either inside the image or where the padded image ends.
        """
        x_BCHW = (x_BCHW - self.mean) / self.std
        grid: Grid = {}
        logits: dict[int, Tensor] = {}
        for depth in range(self.config.level + 1):
            self.step(depth, grid, x_BCHW)
            if depth in self.config.head_levels:
                logits[depth] = self.heads[str(depth)](grid[0, depth])
        return logits

    def _pad(self, x_BCHW: Tensor) -> Tensor:
        """Bottom and right, to a multiple that is the same at every level: pruning must not change the border."""
        height, width = x_BCHW.shape[-2:]
        multiple = self.config.pad_multiple
        bottom, right = -height % multiple, -width % multiple
        return F.pad(x_BCHW, (0, right, 0, bottom), mode=self.config.pad_mode) if bottom or right else x_BCHW


def _recomputed(node: nn.Module, inputs: Tensor) -> Tensor:
    """The node's output, of which only the inputs are kept for the backward pass (Chen et al. 2016)."""
    return checkpoint(node, inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_left(node)))


@contextmanager
def _statistics_left(node: nn.Module) -> Iterator[None]:
    """A second computation of the same batch must not count in BatchNorm's running statistics."""
    norms = [layer for layer in node.modules() if isinstance(layer, nn.BatchNorm2d) and layer.training]  # not frozen
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.sub_(1)


def _init_weights(module: nn.Module) -> None:
    """He et al. 2015 for convolutions before a ReLU; unit gain for the others, whose outputs are not rectified."""
    if isinstance(module, nn.ConvTranspose2d) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
        # A transposed convolution's stride is its kernel: an output pixel sees each input channel once.
        nn.init.normal_(module.weight, std=module.in_channels**-0.5)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def count_parameters(model: nn.Module) -> int:
    """Number of weights; buffers such as BatchNorm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gmacs(config: ModelConfig, height: int, width: int) -> float:
    """Billions of multiply-adds of one forward of one image; convolutions and transposed convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        UNetPlusPlus(config).eval()(torch.empty(1, config.in_channels, height, width))
    return counter.get_total_flops() / 2e9
