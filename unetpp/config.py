"""What a model is, as data. Imports no torch, so that flows and the command line stay light."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Level = Annotated[int, Field(ge=1, le=4)]
"""Pruning level L1..L4: the network that ends in node X^{0,L} (Zhou et al. 2018, figure 2)."""

IGNORE = 255
"""Target value of pixels that are not labelled: they count in no loss and in no score. No class has this id."""

PixelType = Literal["uint8", "uint16", "float32"]

Bands = Annotated[tuple[Annotated[int, Field(ge=0, le=255)], ...], Field(min_length=1)]
"""Channels of an image file, counted from 0, in the order in which they are wanted: see `unetpp.images`."""

BANDS = "channels of an image file that the network reads, from 0, such as 3,2,1; default: grey or RGB"

Pages = Literal["first", "refuse"]
"""What is done of a file with several pages or frames: the first is the image, or it is refused."""

SynthKind = Literal["nuclei", "cells", "camera16"]
"""Kinds of synthetic sets: see `unetpp.synth`."""


class Frozen(BaseModel):
    """A validated, immutable config: unknown keys are refused, and so are numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ValueRange(Frozen):
    """File values that become 0 and 1, by pixel type.

    A camera with 12 bits in 16-bit files states `uint16: [0, 4095]`. Nothing is guessed per file.
    """

    uint8: tuple[float, float] = (0.0, 255.0)
    uint16: tuple[float, float] = (0.0, 65535.0)
    float32: tuple[float, float] = (0.0, 1.0)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        for pixel_type in ("uint8", "uint16", "float32"):
            low, high = getattr(self, pixel_type)
            if not low < high:
                raise ValueError(f"{pixel_type}: [{low}, {high}] is empty; the first value must be below the second")
        return self


class ModelConfig(Frozen):
    """Architecture, scaling and padding of one UNet++. `level` decides nodes, heads, stride, halo and cost."""

    level: Level = Field(4, description="deepest level: nodes X^{i,j} with i + j <= level are built")
    in_channels: Annotated[int, Field(ge=1, le=64)] = Field(3, description="channels of an input image")
    bands: Bands | None = Field(None, description=BANDS)
    num_classes: Annotated[int, Field(ge=1, le=255)] = Field(
        1, description="1: one foreground probability (sigmoid); 2 or more: one class per pixel (softmax)"
    )
    filters: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (32, 64, 128, 256, 512), description="channels of the nodes by depth i; level + 1 of them are used"
    )
    norm: Literal["batch", "none"] = Field("batch", description="none is the paper's variant, with biased convolutions")
    upsample: Literal["deconv", "nearest", "bilinear"] = Field("deconv", description="deconv is the paper's")
    deep_supervision: bool = Field(True, description="a head at every level; without it only at the deepest")
    pad_multiple: Literal[16, 32, 64] = Field(16, description="images are padded to this multiple at every level")
    pad_mode: Literal["replicate"] = Field("replicate", description="reflect would fail on one-pixel images")
    ignore_index: Literal[255] | None = Field(
        None, description="mask value of pixels that are not labelled: 255, or none; they count in no loss and no score"
    )
    value_range: ValueRange = ValueRange()
    gamma: Annotated[float, Field(gt=0)] = Field(
        1.0, description="exponent on values in 0..1; below 1 it lifts dim structures out of a dark ground"
    )
    mean: tuple[float, ...] = Field((0.5,), description="subtracted from values in 0..1; one, or one a channel")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.25,), description="divides after that")
    temperature: dict[Level, Annotated[float, Field(gt=0)]] = Field(
        {}, description="what each head's logits are divided by to become probabilities, by level; default: 1"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.filters) < self.level + 1:
            raise ValueError(f"level {self.level} needs {self.level + 1} filters, got {len(self.filters)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.in_channels):
                raise ValueError(f"{name} must have 1 or {self.in_channels} values, got {len(getattr(self, name))}")
        if self.bands is not None and not self.can_read(self.bands):
            raise ValueError(f"bands names {len(self.bands)} channels, in_channels is {self.in_channels}")
        if strange := sorted(set(self.temperature) - set(self.head_levels)):
            raise ValueError(f"temperature names levels {strange}, the model has heads {list(self.head_levels)}")
        return self

    def can_read(self, bands: Bands) -> bool:
        """Whether images of these bands have the network's channels, or can be given them: see `images.to_channels`."""
        return len(bands) == self.in_channels or {len(bands), self.in_channels} == {1, 3}

    @property
    def head_levels(self) -> tuple[int, ...]:
        """Levels that have a head: 1..level with deep supervision, else the deepest alone."""
        return tuple(range(1, self.level + 1)) if self.deep_supervision else (self.level,)

    @property
    def nodes(self) -> tuple[tuple[int, int], ...]:
        """(i, j) of every node X^{i,j}, i + j <= level, in the order in which they are computed."""
        return tuple((depth - j, j) for depth in range(self.level + 1) for j in range(depth + 1))

    def node_channels(self, i: int, j: int) -> int:
        """Channels that node X^{i,j} reads: the skips before it and what is upsampled from below."""
        if j == 0:
            return self.in_channels if i == 0 else self.filters[i - 1]
        return j * self.filters[i] + self.filters[i if self.upsample == "deconv" else i + 1]

    @property
    def stride(self) -> int:
        """Pixels that one pixel of the deepest node stands for: 2**level."""
        return 2**self.level

    @property
    def reach_px(self) -> int:
        """Largest distance, in pixels, over which an input pixel can change an output pixel."""
        return 8 * self.stride - 6 if self.upsample == "bilinear" else 7 * self.stride - 5

    @property
    def halo_px(self) -> int:
        """`reach_px` rounded up to the stride: the margin that makes a tile's core exact."""
        return -(-self.reach_px // self.stride) * self.stride


class AugmentConfig(Frozen):
    """Random changes of a training crop; each probability is per crop."""

    flip: bool = Field(True, description="mirror left-right and up-down, each with probability 1/2")
    rotate90: bool = Field(True, description="turn by a multiple of 90 degrees")
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = Field(
        0.0, description="largest free turn either way, degrees; 180: any"
    )
    scale: tuple[Annotated[float, Field(ge=0.1)], Annotated[float, Field(le=10)]] = Field(
        (0.8, 1.25), description="zoom factor, drawn log-uniformly; of 0.1, a crop is made of a window 10 times as wide"
    )
    elastic_px: Annotated[float, Field(ge=0)] = Field(
        0.0, description="largest displacement of a smooth random bend, pixels of the crop"
    )
    elastic_sigma_px: Annotated[float, Field(gt=0)] = Field(
        16.0, description="smoothness of the bend: deviation of the Gaussian it is like, pixels of the crop"
    )
    gamma: tuple[float, float] = Field((0.7, 1.4), description="exponent on values in 0..1, drawn log-uniformly")
    brightness: tuple[float, float] = Field((0.7, 1.3), description="factor on the values, drawn log-uniformly")
    contrast: tuple[float, float] = Field(
        (1.0, 1.0), description="factor on the distance from the mean of the crop's channel, drawn log-uniformly"
    )
    noise_std: Annotated[float, Field(ge=0)] = Field(0.02, description="largest standard deviation of added noise")
    blur_sigma: Annotated[float, Field(ge=0)] = Field(0.8, description="largest Gaussian blur, pixels")
    invert: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="probability of exchanging dark and light")
    drop_colour: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="probability of a grey crop")
    channel_jitter: Annotated[float, Field(ge=0)] = Field(0.05, description="largest change of a channel's gain")
    stain_jitter: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="largest change of haematoxylin, eosin and DAB, as a share and as optical density, 0.05 is a good "
        "deal; in colour images of 3 channels only, grey crops stay as they are",
    )
    counterstain: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0,
        description="largest optical density of a random pattern of eosin or red, laid over every second colour crop: "
        "cytoplasm, fibres and blood that are no nuclei; in images of 3 channels only, grey crops stay as they are",
    )

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        for name in ("scale", "gamma", "brightness", "contrast"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: saw [{low}, {high}], wanted two factors above 0, the smaller one first")
        if self.elastic_px > self.elastic_sigma_px:
            raise ValueError(
                f"elastic_px {self.elastic_px} must be at most elastic_sigma_px {self.elastic_sigma_px}: "
                "a bend that is larger than it is smooth folds the image over itself"
            )
        return self
