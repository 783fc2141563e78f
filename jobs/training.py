"""What a training worker carries from step to step: weights, their moving average, optimiser, schedule."""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jobs.contract import TrainConfig
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError, UnetppError
from unetpp.loss import deep_supervision_loss
from unetpp.model import UNetPlusPlus
from unetpp.torch_engine import plain_float32

MAX_SKIPPED = 10
"""Steps in a row without a finite gradient, after which training has diverged."""

Batch = tuple[Tensor, Tensor]
"""x_BCHW float32 and target_BHW uint8."""
Tensors = tuple[Tensor, ...] | list[Tensor]


class DivergedError(UnetppError):
    """The gradient stayed without meaning for MAX_SKIPPED steps."""


class TrainingState:
    """What a step changes and a checkpoint holds."""

    def __init__(
        self,
        config: TrainConfig,
        num_steps: int,
        network: UNetPlusPlus,
        device: torch.device,
        share: Callable[[nn.Module], nn.Module],
    ) -> None:
        """`share` makes the network one of several that train together, such as Ray Train's `prepare_model`."""
        self.config, self.device, self.num_steps = config, device, num_steps
        self.seconds, self.learning_rate_factor = 0.0, 1.0
        self.num_skipped, self.skipped_in_a_row = 0, 0
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(self.network, multi_avg_fn=_warmed_up_average(config.ema_decay), use_buffers=True)
        self._trained = share(self.network)
        self._forward = torch.compile(self._trained) if config.compile else self._trained
        self.optimiser = _optimiser(self.network, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: self._learning_rate(step))
        self._autocast_type = _autocast_type(config, device)
        if self._autocast_type is not None and device.type == "cuda":
            plain_float32()  # of the convolution that reads pixels: nothing else is in float32 then
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._autocast_type is torch.float16)
        self._parts: dict[str, Any] = {
            "model": self.network,
            "average": self.average,
            "optimiser": self.optimiser,
            "schedule": self.schedule,
            "scaler": self._scaler,
        }

    @property
    def averaged(self) -> UNetPlusPlus:
        """The network with the averaged weights: what is validated and exported."""
        network = self.average.module
        assert isinstance(network, UNetPlusPlus)
        return network

    @property
    def num_steps_done(self) -> int:
        """Steps so far, those without a finite gradient included."""
        return int(self.schedule.last_epoch)

    def save(self) -> bytes:
        """Everything that the next step starts from."""
        content = {name: part.state_dict() for name, part in self._parts.items()}
        content["counters"] = {
            "seconds": self.seconds,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "learning_rate_factor": self.learning_rate_factor,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def restore(self, content: bytes) -> None:
        """Read it back."""
        saved = torch.load(io.BytesIO(content), map_location=self.device, weights_only=True)
        for name, value in saved.pop("counters").items():
            setattr(self, name, value)
        for name, part in self._parts.items():
            part.load_state_dict(saved[name])

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimiser.param_groups[0]["lr"])

    def slow_down(self, factor: float) -> None:
        """From now on, and in the checkpoints that follow, take `factor` of the config's learning rate."""
        self.learning_rate_factor = factor
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate * self._learning_rate(self.num_steps_done)

    def train(self) -> None:
        """Go into training mode; frozen normalisation stays as it is."""
        self._trained.train()
        if self.config.freeze_norm:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def step(self, micro_batches: Sequence[Batch], world_size: int) -> Tensor:
        """One optimiser step over this worker's part of a batch; its part of the loss, a scalar on the device.

        The parts of all workers add up to the mean loss of the whole batch, however it was shared out. A step whose
        gradient is not finite changes nothing; DivergedError after MAX_SKIPPED of them in a row.
        """
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        self.optimiser.zero_grad(set_to_none=True)
        losses = []
        for number, (x_BCHW, target_BHW) in enumerate(micro_batches, start=1):
            with self._synchronised(number == len(micro_batches)):
                x_BCHW, target_BHW = (part.to(self.device, non_blocking=True) for part in (x_BCHW, target_BHW))
                loss = self._loss(x_BCHW, target_BHW) * (len(x_BCHW) / self.config.batch_size)
                self._scaler.scale(loss * world_size).backward()  # the workers' gradients are averaged, not added
            losses.append(loss.detach())
        self._scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_gradient_norm or math.inf)
        if bool(norm.isfinite()):
            self.skipped_in_a_row = 0
            self._scaler.step(self.optimiser)
            self.average.update_parameters(self.network)
        else:
            self.num_skipped, self.skipped_in_a_row = self.num_skipped + 1, self.skipped_in_a_row + 1
            for buffer, value in zip(self.network.buffers(), statistics, strict=True):
                buffer.copy_(value)  # the forward has taken them from what was not finite
        self._scaler.update()
        self.schedule.step()
        if self.skipped_in_a_row > MAX_SKIPPED:
            raise DivergedError(f"{MAX_SKIPPED} steps in a row had no finite gradient")
        return torch.stack(losses).sum()

    def _loss(self, x_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
        config, half = self.config, self._autocast_type
        with torch.autocast(self.device.type, half or torch.bfloat16, enabled=half is not None):
            logits = self._forward(x_BCHW)
        return deep_supervision_loss(
            logits,
            target_BHW,
            config.head_weights,
            class_weights=config.class_weights,
            distillation=config.distillation,
            teacher=config.teacher,
        )

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Only the last part of an accumulated gradient is exchanged between the workers."""
        if last or not isinstance(self._trained, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._trained.no_sync()

    def _learning_rate(self, step: int) -> float:
        """Warm-up, then half a cosine over the steps, or over the time there is if that ends first."""
        if step < self.config.warmup_steps:
            return self.learning_rate_factor * (step + 1) / self.config.warmup_steps
        share = (step - self.config.warmup_steps) / max(1, self.num_steps - self.config.warmup_steps)
        if self.config.max_seconds is not None:
            share = max(share, self.seconds / self.config.max_seconds)
        return self.learning_rate_factor * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def first_network(config: TrainConfig, initial: UNetPlusPlus | None = None) -> UNetPlusPlus:
    """The network that training begins with: the weights of `initial`, else random ones of the config's seed."""
    torch.manual_seed(config.seed)
    network = UNetPlusPlus(config.model)
    network.recompute = config.recompute
    if initial is not None:
        take_weights(network, initial)
    return network


SAME_AS_INITIAL = ("in_channels", "num_classes", "norm", "upsample", "gamma", "mean", "std")
"""What of a model's config its weights were made for, beside its filters and heads."""


def take_weights(network: UNetPlusPlus, initial: UNetPlusPlus) -> None:
    """Copy the nodes and heads of `network` from `initial`.

    ConfigError where that has others, or was trained on an input of another scale. `value_range` and `bands` are the
    images' own.
    """
    theirs, ours = initial.config, network.config
    depths = min(theirs.level, ours.level) + 1
    pairs = {name: (getattr(theirs, name), getattr(ours, name)) for name in SAME_AS_INITIAL}
    pairs["filters"] = theirs.filters[:depths], ours.filters[:depths]
    if not set(ours.head_levels) <= set(theirs.head_levels):
        pairs["heads at levels"] = theirs.head_levels, ours.head_levels
    if different := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        has, wants = (", ".join(f"{name} {pair[n]}" for name, pair in different.items()) for n in (0, 1))
        raise ConfigError(
            f"init: the model to start from has {has}, this config {wants}, for which its weights were not made; set "
            "the same in model, and level and deep_supervision so that it has every head"
        )
    have = initial.state_dict()
    network.load_state_dict({name: have[name] for name in network.state_dict()})


def _optimiser(network: UNetPlusPlus, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimiser == "sgd":
        return torch.optim.SGD(
            network.parameters(), config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True)


def _autocast_type(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The type of the convolutions; None for float32."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.precision]


def _warmed_up_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Exponential moving average whose early steps forget the random start faster. Counters are copied."""

    def average(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        # All tensors of one call have one type and device.
        if averaged[0].is_floating_point():
            n = float(num_averaged)
            get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)
        else:
            for count, value in zip(averaged, current, strict=True):
                count.copy_(value)

    return average


def trained_network(model: ModelConfig, content: bytes) -> UNetPlusPlus:
    """The averaged network of a saved state, in eval mode on the CPU."""
    network = UNetPlusPlus(model)
    average = AveragedModel(network, use_buffers=True)
    average.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)["average"])
    network.load_state_dict(average.module.state_dict())
    return network.eval()
