"""The program of a `jobs.guarded.Child`: takes one image after the other under limits, until its socket closes."""

import importlib
import json
import math
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetpp.allocator import return_large_arrays
from unetpp.errors import ImageError
from unetpp.regions import Picture
from unetpp.spans import BATCH_SPANS, Read, Span
from unetpp.tiles import Box

Work = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], NDArray[np.generic]]]
"""(header, content) -> (answer, pixels)."""

ORPHAN_FACTOR = 10
"""The clock on the wall may run this much longer than the CPU's, should the parent, who is stricter, be gone."""
NO_PIXELS = np.zeros((1, 1), np.uint8)


def decoding(read: Read, decoder: str) -> Work:
    """Work that decodes: header {max_pixels, pages, bands}, content an image file, answer {geo}, pixels image_HWC.

    With a `name` and `size_bytes` the header is of a file that is read in spans: of it the pixels inside `box`, or
    without one its measure. The file that was asked about last stays open.
    """
    module, _, name = decoder.partition(":")
    decode = getattr(importlib.import_module(module), name)
    opened: dict[str, Picture] = {}

    def work(header: dict[str, Any], content: bytes) -> tuple[dict[str, Any], NDArray[np.generic]]:
        how = {name: header[name] for name in ("max_pixels", "pages", "bands")}
        picture = opened.pop(header["name"], None) if "name" in header else None
        opened.clear()
        if "name" not in header:
            image_HWC, geo = decode(content, **how)
            return {"geo": geo}, image_HWC
        picture = picture or Picture(read, header["size_bytes"], **how)
        answer = {"measure": [picture.height, picture.width, picture.fits], "geo": picture.geo}
        pixels = NO_PIXELS if header["box"] is None else picture.region(Box(*header["box"]))
        opened[header["name"]] = picture
        return answer, pixels

    return work


def predicting(model_dir: str, **how: Any) -> Work:
    """Work that predicts: header {shape, dtype, kept}, content the pixels of image_HWC, pixels mask and probability.

    `how` as `Predictor.from_pretrained` takes it.
    """
    from unetpp.predictor import Predictor

    predictor = Predictor.from_pretrained(model_dir, **how)

    def predict(header: dict[str, Any], content: bytes) -> tuple[dict[str, Any], NDArray[np.generic]]:
        image_HWC = np.frombuffer(content, header["dtype"]).reshape(header["shape"])
        kept = None if header["kept"] is None else Box(*header["kept"])
        prediction = predictor.predict([image_HWC], [kept])[0]
        planes = [each for each in (prediction.mask_HW, prediction.probability_HW) if each is not None]
        return {"said": [prediction.uncertainty, prediction.finite, prediction.degraded]}, np.stack(planes)

    return predict


def main(socket_fd: int, memory_fd: int, work: dict[str, Any]) -> None:
    """Answer until the parent closes the socket, or is gone. A header may allow itself other seconds than the work."""
    return_large_arrays()
    seconds, memory_bytes, kind = work.pop("seconds"), work.pop("memory_bytes"), work.pop("kind")
    connection = Connection(socket_fd)

    def read(spans: Sequence[Span]) -> list[bytes]:
        contents: list[bytes] = []
        left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # the wait is the store's; a parent that is gone ends it
        try:
            for first in range(0, len(spans), BATCH_SPANS):
                wanted = spans[first : first + BATCH_SPANS]
                connection.send_bytes(json.dumps({"read": wanted}).encode())
                contents += [connection.recv_bytes() for _ in wanted]
        finally:
            signal.setitimer(signal.ITIMER_REAL, left_s)
        return contents

    do = decoding(read, **work) if kind == "decode" else predicting(**work)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        with open("/proc/self/statm") as file:
            idle_bytes = int(file.read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (idle_bytes + memory_bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (memory_bytes,) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what hostile bytes make libraries say is nobody's
    connection.send_bytes(b"ready")  # what ends this process from here on is an image
    while True:
        try:
            header = json.loads(connection.recv_bytes())
            content = connection.recv_bytes()
        except EOFError:
            return
        _set_clocks(header.get("seconds", seconds))
        try:
            answer, pixels = do(header, content)
            answer |= {"shape": pixels.shape, "dtype": str(pixels.dtype)}
            _share(memory_fd, pixels)
        except ImageError as error:
            answer = {"code": error.code, "detail": error.detail}
        except MemoryError:
            answer = {"code": "too_large", "detail": f"it needs more than {memory_bytes >> 20} MiB of memory"}
        except Exception as error:
            answer = {"code": "crash", "detail": f"{type(error).__name__}: {error}"[:2000]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(answer).encode())


def _set_clocks(seconds: float) -> None:
    """Signals that end the process whatever it does: by the CPU's clock, and, should the parent die, by the wall's."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, seconds * ORPHAN_FACTOR)


def _share(memory_fd: int, pixels: NDArray[np.generic]) -> None:
    num_written, view = 0, np.ascontiguousarray(pixels).data.cast("B")
    while num_written < len(view):
        num_written += os.pwrite(memory_fd, view[num_written:], num_written)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
