"""U-Net (Ronneberger et al. 2015) of UNet++'s widths, from the nodes of UNet++: its peer in the benchmarks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetpp.config import ModelConfig
from unetpp.model import Node, UNetPlusPlus, _init_weights, _upsampler


class UNet(UNetPlusPlus):
    """The nodes X^{i,0} and, going up, one decoder node at each depth: what is left of UNet++ without its pathways.

    Same blocks, widths, upsampling, first weights' rule and padding; one head, at the end, called by the level.
    """

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        assert not config.deep_supervision, "a U-Net has one head"
        self.config, self.recompute = config, False
        filters, level = config.filters, config.level
        inputs = (config.in_channels, *filters[:level])
        self.encoders = nn.ModuleList([Node(inputs[i], filters[i], config.norm) for i in range(level + 1)])
        self.upsamplers = nn.ModuleList([_upsampler(filters[i + 1], filters[i], config.upsample) for i in range(level)])
        lifted = [filters[i] if config.upsample == "deconv" else filters[i + 1] for i in range(level)]
        self.decoders = nn.ModuleList([Node(filters[i] + lifted[i], filters[i], config.norm) for i in range(level)])
        self.head = nn.Conv2d(filters[0], config.num_classes, 1)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)
        self.apply(_init_weights)

    def heads_of(self, x_BCHW: Tensor) -> dict[int, Tensor]:
        """See `UNetPlusPlus.heads_of`."""
        features = (x_BCHW - self.mean) / self.std
        skips: list[Tensor] = []
        for encoder in self.encoders:
            features = encoder(features if not skips else F.max_pool2d(features, 2))
            skips.append(features)
        for i in reversed(range(self.config.level)):
            features = self.decoders[i](torch.cat([skips[i], self.upsamplers[i](features)], dim=1))
        return {self.config.level: self.head(features)}
