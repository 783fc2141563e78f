"""What a training worker carries from step to step, and how it tells the driver."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray.train.torch import prepare_model
from ray.util.queue import Empty, Queue
from torch.optim.swa_utils import AveragedModel

from jobs.contract import TrainConfig
from unetpp.errors import ConfigError
from unetpp.loss import deep_supervision_loss
from unetpp.model import UNetPlusPlus

logger = logging.getLogger(__name__)

PROGRESS_S = 30


class TrainingState:
    """What an epoch changes and a checkpoint holds: weights, their moving average, optimiser, schedule."""

    def __init__(self, config: TrainConfig, num_steps: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        model = UNetPlusPlus(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(model, avg_fn=_warmed_up_average(config.ema_decay), use_buffers=True)
        self.model = prepare_model(model)
        self.optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, _warm_up_and_cosine(config.warmup_steps, num_steps)
        )
        self.parts: dict[str, Any] = {
            "model": model,
            "average": self.average,
            "optimiser": self.optimiser,
            "schedule": self.schedule,
        }

    @property
    def averaged(self) -> UNetPlusPlus:
        """The network with the averaged weights: what is validated and exported."""
        network = self.average.module
        assert isinstance(network, UNetPlusPlus)
        return network

    def save(self, path: Path, epoch: int) -> None:
        """Write everything that the next epoch starts from."""
        torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in self.parts.items()}}, path)

    def restore(self, path: Path, device: torch.device) -> int:
        """Read it back and return the next epoch."""
        saved = torch.load(path, map_location=device, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return int(saved["epoch"]) + 1

    def step(self, x_BCHW: torch.Tensor, target_BHW: torch.Tensor, head_weights: dict[int, float] | None) -> float:
        """One optimiser step; the loss. ConfigError when it is not finite."""
        loss = deep_supervision_loss(self.model(x_BCHW), target_BHW, head_weights)
        if not loss.isfinite():
            raise ConfigError(
                f"the loss became {loss.item()}; lower learning_rate, or look for broken values in the data"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.parts["model"])
        return loss.item()


def _warmed_up_average(decay: float) -> Callable[..., torch.Tensor]:
    """Exponential moving average whose early steps forget the random start faster."""

    def average(averaged: torch.Tensor, current: torch.Tensor, num_averaged: torch.Tensor | int) -> torch.Tensor:
        n = float(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        return torch.lerp(averaged, current, weight) if averaged.is_floating_point() else current

    return average


def _warm_up_and_cosine(warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


class Progress:
    """Sentences for the driver's log: one an epoch, and one now and then between. Silent without a channel."""

    def __init__(self, news: Queue | None, num_epochs: int, steps_per_epoch: int) -> None:
        self.news = news
        self.num_epochs = num_epochs
        self.steps_per_epoch = steps_per_epoch
        self._told = time.monotonic()

    def step(self, epoch: int, losses: list[float]) -> None:
        """Say how far the epoch is, at most every PROGRESS_S seconds."""
        if self.news is not None and time.monotonic() - self._told > PROGRESS_S:
            recent = losses[-20:]
            self._tell(
                f"epoch {epoch + 1}/{self.num_epochs}  step {len(losses)}/{self.steps_per_epoch}  "
                f"loss {sum(recent) / len(recent):.4f}"
            )

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Say how the epoch ended."""
        levels = "  ".join(f"{name} {value:.4f}" for name, value in metrics["val_iou"].items())
        self._tell(
            f"epoch {metrics['epoch'] + 1}/{self.num_epochs}  loss {metrics['loss']:.4f}  val IoU {levels}  "
            f"{metrics['seconds']:.0f} s"
        )

    def _tell(self, sentence: str) -> None:
        self._told = time.monotonic()
        if self.news is not None:
            self.news.put(sentence)


@contextmanager
def logged(news: Queue) -> Iterator[None]:
    """Log what the workers tell, while the block runs."""
    over = threading.Event()

    def listen() -> None:
        while True:
            try:
                logger.info(news.get(timeout=1))
            except Empty:
                if over.is_set():
                    return

    listener = threading.Thread(target=listen, name="training progress")
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
        news.shutdown()
