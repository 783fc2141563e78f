"""A child process for what hostile bytes may break: a decoder that crashes, hangs or eats memory costs one image.

```
parent  --header, content (socket)-->  child: limits, work  --answer (socket), pixels (shared memory)-->  parent
```
For regions of a huge image the child asks back, before it answers, for the spans of bytes that it needs: the parent
reads them. The child is a program of its own (`jobs.guarded_child`), not a fork: it holds no credential of ours, and
starts alike under any program. Its answers are data, never pickles, and are checked before they are believed.
"""

import contextlib
import json
import math
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray

from jobs.contract import WALL_FACTOR, PredictConfig
from jobs.ranged import Ranged
from unetpp.config import Bands, Level, Pages
from unetpp.engine_names import EngineChoice
from unetpp.engines import Mode
from unetpp.errors import ImageError, ImageErrorCode, UnetppError
from unetpp.images import Decoded
from unetpp.predictor import Image, Prediction
from unetpp.tiles import Box

DECODER = "unetpp.images:read_image"
"""module:function that decodes in the child: (bytes, max_pixels, pages, bands) -> Decoded."""

PIXEL_TYPES = ("uint8", "uint16", "float32")
PREDICT_SECONDS = 600.0
LOOK_S = 1.0
"""From one look whether a child has answered to the next."""
MAX_ANSWER_BYTES, KEPT_BYTES = 1 << 20, 64 << 20
MAX_READINGS = 4
"""How many times its size of an image may be read for one answer."""
START_SECONDS = 300.0
SAID_LINES = 5
"""Of what a child that cannot start says of it."""
PASSED_ON = ("LD_LIBRARY_PATH", "ONEDNN_MAX_CPU_ISA")


class Limits(NamedTuple):
    """What one image may cost. memory_bytes counts beyond what the idle child needs; 0: no limit."""

    seconds: float
    memory_bytes: int = 0

    @classmethod
    def of(cls, config: PredictConfig) -> Self:
        """What decoding one image may cost."""
        return cls(config.decode_seconds, config.decode_memory_mb << 20)


class Measure(NamedTuple):
    """Size of an image as it is shown; `fits`: its regions can be read."""

    height: int
    width: int
    fits: bool


class Child:
    """One child process, started when it is first asked, and again after it died."""

    def __init__(self, work: dict[str, Any], limits: Limits, waiting: Callable[[], None] = lambda: None) -> None:
        """`work` is told to the child: see `jobs.guarded_child`. `waiting` is called now and then until it answers."""
        self._work, self._limits, self._waiting = work, limits, waiting
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory = -1

    def ask(self, header: dict[str, Any], content: bytes | memoryview) -> tuple[dict[str, Any], NDArray[np.generic]]:
        """The child's answer to (header, content): a dictionary and pixels.

        ImageError: what the child says is wrong with the image, `crash` where it died of it, `timeout` where it was
        given up. UnetppError where no child can start.
        """
        answer = self._understood(self._answer(self._begin(header, content)))
        return answer, self._pixels(answer)

    def allow(self, seconds: float) -> None:
        """From now on an answer may cost so much; the header of a question has to say so, too."""
        self._limits = self._limits._replace(seconds=seconds)

    def ask_about(self, source: Ranged, header: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.generic]]:
        """As `ask`, of an image whose bytes the child asks for; what `source.read` raises is passed on."""
        connection = self._begin(header | {"name": source.name, "size_bytes": source.size_bytes}, b"")
        num_left = MAX_READINGS * source.size_bytes + KEPT_BYTES
        while (wanted := (answer := self._answer(connection)).get("read")) is not None:
            spans = [(int(start), int(stop)) for start, stop in wanted]
            num_left -= sum(stop - start for start, stop in spans)
            if num_left < 0 or any(not 0 <= start < stop <= source.size_bytes for start, stop in spans):
                self.close()
                raise ImageError("crash", f"the process that worked on it asked for strange bytes: {str(spans)[:200]}")
            try:
                for content in source.read(spans):
                    connection.send_bytes(content)
            except OSError:
                raise self._death() from None
            except BaseException:
                self.close()  # it waits for bytes that do not come
                raise
        answer = self._understood(answer)
        return answer, self._pixels(answer)

    def _answer(self, connection: Connection) -> dict[str, Any]:
        wall_s = self._limits.seconds * WALL_FACTOR
        deadline = time.monotonic() + wall_s
        try:
            while not self._answers.poll(min(wall_s, LOOK_S) * 1000):
                if time.monotonic() > deadline:
                    self.close()
                    raise ImageError("timeout", f"it took longer than {wall_s:g} s")
                self._waiting()
            content = connection.recv_bytes(MAX_ANSWER_BYTES)
        except (EOFError, OSError):
            raise self._death() from None
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(answer := json.loads(content), dict):
                return answer
        self.close()
        raise ImageError("crash", f"the process that worked on it answered nonsense: {content[:200]!r}")

    def _understood(self, answer: dict[str, Any]) -> dict[str, Any]:
        if answer.get("code") is not None:
            code, detail = str(answer["code"]), str(answer.get("detail", ""))
            raise ImageError(code if code in get_args(ImageErrorCode) else "crash", detail)  # type: ignore[arg-type]
        return answer

    def _begin(self, header: dict[str, Any], content: bytes | memoryview) -> Connection:
        """Hand the work over; a child that died since the last time, of whatever, is replaced once."""
        for is_last in (False, True):
            connection = self._connection if self._is_alive() else self._start()
            assert connection is not None
            try:
                connection.send_bytes(json.dumps(header).encode())
                connection.send_bytes(content)
                return connection
            except OSError:
                if is_last:
                    raise self._death() from None
                self.close()
        raise AssertionError("not reached")

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> Connection:
        """A child that is ready for an image. UnetppError where it cannot start: no image is to blame."""
        self.close()
        ours, theirs = socket.socketpair()
        self._memory = os.memfd_create("unetpp-pixels", os.MFD_CLOEXEC)
        work = {**self._work, "seconds": self._limits.seconds, "memory_bytes": self._limits.memory_bytes}
        with theirs, open(os.memfd_create("unetpp-stderr", os.MFD_CLOEXEC), "rb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.guarded_child", str(theirs.fileno()), str(self._memory), json.dumps(work)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=(theirs.fileno(), self._memory),
                # Nothing of ours but where the code is, and how it computes: above all no credential.
                env={
                    "PATH": os.defpath,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": "1",
                    **{name: value for name, value in os.environ.items() if name in PASSED_ON},
                },
                start_new_session=True,
            )
            theirs.close()  # else nobody would see that the child closed its own
            self._connection = Connection(ours.detach())
            self._answers = select.poll()
            self._answers.register(self._connection.fileno(), select.POLLIN)
            self._wait_until_ready(self._connection, said)
        return self._connection

    def _wait_until_ready(self, connection: Connection, said: BinaryIO) -> None:
        """Until the child can take an image. UnetppError, with the last that it said, where it cannot."""
        try:
            if self._answers.poll(START_SECONDS * 1000):
                connection.recv_bytes(MAX_ANSWER_BYTES)
                return
            how = f"it was not ready after {START_SECONDS:g} s"
            self.close()
        except (EOFError, OSError):
            how = f"it ended with {_how(self._end())}"
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()[-SAID_LINES:]
        raise UnetppError(
            f"the process that images are given to cannot start: {how}, and said: {' | '.join(lines) or 'nothing'}. "
            f"Of the environment it has {', '.join(PASSED_ON)} and where Python looks for modules: mend what it names, "
            "then the same command goes on from here"
        )

    def _end(self) -> int:
        """End the child, if it lives; its exit status."""
        assert self._process is not None
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:  # it closed its socket, and lives
            status = 0
        self.close()
        return status

    def _death(self) -> ImageError:
        """Why the child ended, as the error of the image that it worked on."""
        status = self._end()
        if -status in (signal.SIGXCPU, signal.SIGALRM):
            return ImageError("timeout", f"it took longer than {self._limits.seconds:g} s of work")
        return ImageError("crash", f"the process that worked on it ended with {_how(status)}")

    def _pixels(self, answer: dict[str, Any]) -> NDArray[np.generic]:
        """A copy of what the child wrote; ImageError where the answer does not fit it."""
        shape, pixel_type = answer.get("shape"), answer.get("dtype")
        is_shape = isinstance(shape, list) and 2 <= len(shape) <= 3 and all(type(n) is int and n > 0 for n in shape)
        if not is_shape or pixel_type not in PIXEL_TYPES:
            raise ImageError("crash", f"the process that worked on it answered nonsense: {str(answer)[:200]}")
        assert isinstance(shape, list)
        dtype = np.dtype(pixel_type)
        num_bytes, there = math.prod(shape) * dtype.itemsize, os.fstat(self._memory).st_size
        if num_bytes > there:
            raise ImageError("crash", f"the process that worked on it promised {num_bytes} bytes and gave {there}")
        pixels = np.empty(shape, dtype)
        num_read, view = 0, pixels.data.cast("B")
        while num_read < num_bytes and (more := os.preadv(self._memory, [view[num_read:]], num_read)):
            num_read += more
        if num_read < num_bytes:
            raise ImageError("crash", f"the process that worked on it took back {num_bytes - num_read} bytes")
        if there > KEPT_BYTES:
            os.ftruncate(self._memory, 0)
        return pixels

    def close(self) -> None:
        """End the child. The next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


class DecodePool:
    """Decodes untrusted bytes in at most `size` child processes; for any number of threads."""

    def __init__(
        self, size: int, *, max_pixels: int, limits: Limits, pages: Pages = "first", bands: Bands | None = None
    ) -> None:
        """`max_pixels`, `pages` and `bands` as `unetpp.images.read_image` takes them."""
        self._header = {"max_pixels": max_pixels, "pages": pages, "bands": bands}
        self._idle: queue.LifoQueue[Child] = queue.LifoQueue()  # the last used is warm
        for _ in range(size):
            self._idle.put(Child({"kind": "decode", "decoder": DECODER}, limits))

    @classmethod
    def of(cls, config: PredictConfig, bands: Bands | None, size: int = 1) -> Self:
        """With the limits of a config, for a model that reads `bands`."""
        return cls(size, max_pixels=config.max_pixels, limits=Limits.of(config), pages=config.pages, bands=bands)

    def decode(self, content: bytes) -> Decoded:
        """As `unetpp.images.read_image`, with its ImageErrors; also `crash` and `timeout`."""
        child = self._idle.get()
        try:
            return _decoded(*child.ask(self._header, content))
        finally:
            self._idle.put(child)

    def measure(self, source: Ranged) -> Measure:
        """The size of an image, from its header; ImageErrors as `decode`."""
        answer, _ = self._about(source, None)
        height, width, fits = answer.get("measure", (0, 0, False))
        return Measure(int(height), int(width), bool(fits))

    def decode_region(self, source: Ranged, size: tuple[int, int], box: Box) -> Decoded:
        """The pixels of an image inside a box, and where the whole of it is on Earth.

        ImageErrors as `decode`, also where its size is not as it was.
        """
        answer, pixels = self._about(source, [box.y0, box.x0, box.y1, box.x1])
        if (seen := tuple(answer.get("measure", ())[:2])) != size:
            raise ImageError("decode", f"it has {seen} pixels, and had {size} when it was planned")
        if pixels.shape[:2] != (box.height, box.width):
            raise ImageError("crash", f"the process that worked on it gave {pixels.shape} pixels for {box}")
        return _decoded(answer, pixels)

    def _about(self, source: Ranged, box: list[int] | None) -> tuple[dict[str, Any], NDArray[np.generic]]:
        child = self._idle.get()
        try:
            return child.ask_about(source, self._header | {"box": box})
        finally:
            self._idle.put(child)

    def close(self) -> None:
        """End the idle children."""
        while not self._idle.empty():
            self._idle.get_nowait().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decoded(answer: dict[str, Any], pixels: NDArray[np.generic]) -> Decoded:
    if pixels.ndim != 3 or not isinstance(geo := answer.get("geo"), str | None):
        raise ImageError("crash", f"the process that worked on it answered nonsense: {str(answer)[:200]}")
    return Decoded(pixels, geo)


class GuardedPredictor:
    """Predicts in a child process on the CPU, one image after the other: what kills it is an ImageError."""

    def __init__(
        self,
        model_dir: Path,
        level: Level,
        mode: Mode,
        tile_px: int,
        seconds: float = PREDICT_SECONDS,
        *,
        seconds_per_pixel: float = 0.0,
        waiting: Callable[[], None] = lambda: None,
        engine: EngineChoice = "auto",
        flips: bool = False,
        probability: bool = False,
    ) -> None:
        """An image may take `seconds` of CPU, or more by its pixels; `waiting` is called now and then meanwhile."""
        work = {"kind": "predict", "model_dir": str(model_dir), "level": level, "mode": mode, "tile_px": tile_px}
        work |= {"engine": engine, "device": "cpu", "threads": 1, "flips": flips, "probability": probability}
        self.batch_images = 1
        self._seconds, self._seconds_per_pixel = seconds, seconds_per_pixel
        self._child = Child(work, Limits(seconds), waiting)

    def predict(self, images: Sequence[Image], kept: Sequence[Box | None] | None = None) -> list[Prediction]:
        """As `Predictor.predict`; ImageError `crash` or `timeout` where an image ends the child."""
        parts = kept or [None] * len(images)
        return [self._one(image, part) for image, part in zip(images, parts, strict=True)]

    def start(
        self, images: Sequence[Image], kept: Sequence[Box | None] | None = None
    ) -> Callable[[], list[Prediction]]:
        """As `Predictor.start`; nothing is done before it is waited for."""
        return lambda: self.predict(images, kept)

    def _one(self, image: Image, kept: Box | None) -> Prediction:
        box = None if kept is None else [kept.y0, kept.x0, kept.y1, kept.x1]
        seconds = max(self._seconds, self._seconds_per_pixel * image.shape[0] * image.shape[1])
        self._child.allow(seconds)
        header = {"shape": image.shape, "dtype": str(image.dtype), "kept": box, "seconds": seconds}
        answer, pixels = self._child.ask(header, np.ascontiguousarray(image).tobytes())
        planes_nHW = pixels.astype(np.uint8, copy=False)
        uncertainty, finite, degraded = answer["said"]
        return Prediction(planes_nHW[0], uncertainty, finite, degraded, planes_nHW[1] if len(planes_nHW) > 1 else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close()
