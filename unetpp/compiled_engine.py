"""The torch engine compiled: bfloat16, on a GPU with CUDA graphs and pinned copies; on CPU it needs a C++ compiler."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from unetpp.engines import Masks, Pixels
from unetpp.model import UNetPlusPlus
from unetpp.torch_engine import TorchEngine

MAX_GRAPHS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Graph:
    """A forward as recorded: it reads and writes the same memory at every replay."""

    graph: torch.cuda.CUDAGraph
    tiles_BHWC: Tensor
    found: list[Tensor]


class _ToBFloat16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


class CompiledEngine(TorchEngine):
    """As `TorchEngine`, in bfloat16, by torch.compile: file values go into what is compiled, and masks come out.

    Scaling and the first convolution are in float32: see `unetpp.model.FileValues`.

    Tiles of the shape that comes first have a form of their own; other shapes share one. Where nothing can be compiled
    the same is computed without: slower, in the same precision, and the log says so.

    On a GPU a batch that was started is uploaded from pinned memory, beside what is computed of the one before it;
    forwards of a shape that comes again are recorded once, as a CUDA graph. What torch.compile can record by itself is
    kept by thread, and Ray's actors compute in others than the main one. All else is one stream, in order: a graph's
    results are on their way into pinned memory of their own before it is replayed.
    """

    def _prepared(self, model: UNetPlusPlus) -> UNetPlusPlus:
        self._compiled = torch.compile(super()._decided)
        self._can_compile = True
        self._lock = threading.Lock()
        self._is_cuda = self.device.type == "cuda"
        if self._is_cuda:
            self._uploads = torch.cuda.Stream(self.device)
        self._can_record = self._is_cuda
        self._seen: set[object] = set()
        self._graphs: dict[object, _Graph] = {}
        network = super()._prepared(model)
        first, mean, std = network.nodes["x00"], network.mean, network.std
        assert isinstance(first, nn.Sequential)
        first[0], reads = nn.Identity(), first[0]
        network.to(torch.bfloat16)
        first[0], network.mean, network.std = nn.Sequential(reads, _ToBFloat16()), mean, std
        return network

    def _started(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> Callable[[], Masks]:
        """Fills the batch up to a power of two: every other number of tiles would be a shape to compile."""
        num_tiles = len(tiles_BHWC)
        if missing := (1 << (num_tiles - 1).bit_length()) - num_tiles:
            tiles_BHWC = np.concatenate([tiles_BHWC, *[tiles_BHWC[-1:]] * missing])
        with self._lock:
            read = super()._started(tiles_BHWC, core)

        def cut() -> Masks:
            masks_BHW, stats = read()
            return masks_BHW[:num_tiles], stats[:num_tiles]

        return cut

    def _uploaded(self, tiles_BHWC: Pixels) -> Tensor:
        tiles = torch.from_numpy(tiles_BHWC)
        if not self._is_cuda:
            return tiles
        with torch.cuda.stream(self._uploads):  # torch gives pinned memory to nobody else before its copy is done
            uploaded = tiles.pin_memory().to(self.device, non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self._uploads)
        return uploaded

    def _downloaded(self, found: list[Tensor], tiles: Tensor) -> Callable[[], list[Tensor]]:
        if not self._is_cuda:
            return super()._downloaded(found, tiles)
        pinned = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in found]
        for there, here in zip(pinned, found, strict=True):
            there.copy_(here, non_blocking=True)
        is_there = torch.cuda.Event(blocking=True)  # else whoever waits for it keeps a CPU busy
        is_there.record(torch.cuda.current_stream(self.device))
        uploaded = [tiles]  # memory of the stream of uploads: free for the next one only when this one was read

        def wait() -> list[Tensor]:
            is_there.synchronize()
            uploaded.clear()
            return [each.clone() for each in pinned]  # pinned memory is for the next batch, masks may be kept

        return wait

    def _decided(self, tiles_BHWC: Tensor) -> list[Tensor]:
        if (recorded := self._graph_of(tiles_BHWC)) is None:
            return self._computed(tiles_BHWC)
        recorded.tiles_BHWC.copy_(tiles_BHWC)
        recorded.graph.replay()
        return recorded.found

    def _graph_of(self, tiles_BHWC: Tensor) -> _Graph | None:
        """The graph of tiles of this kind: recorded when they come again, while there are not too many."""
        kind = (tiles_BHWC.shape, tiles_BHWC.dtype)
        if self._can_record and kind in self._seen and kind not in self._graphs and len(self._graphs) < MAX_GRAPHS:
            try:
                self._graphs[kind] = self._recorded(tiles_BHWC.clone())
            except RuntimeError as error:
                logger.warning("engine compiled goes on without CUDA graphs: %s", str(error).strip().splitlines()[0])
                self._can_record = False
        self._seen.add(kind)
        return self._graphs.get(kind)

    def _recorded(self, tiles_BHWC: Tensor) -> _Graph:
        self._computed(tiles_BHWC)  # what compiles or loads must have done so
        graph = torch.cuda.CUDAGraph()
        # One replay after the other: graphs may share the memory of what they compute in between.
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),  # back to it should recording fail
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            found = self._computed(tiles_BHWC)
        return _Graph(graph, tiles_BHWC, found)

    def _free(self) -> None:
        """Graphs' memory too, and no more of them: memory is short."""
        with self._lock:
            if self._is_cuda:
                torch.cuda.synchronize(self.device)
            self._graphs.clear()
            self._can_record = False
        super()._free()

    def _computed(self, tiles_BHWC: Tensor) -> list[Tensor]:
        if self._can_compile:
            try:
                return self._compiled(tiles_BHWC)
            except (TorchDynamoException, InductorError) as error:
                logger.warning("engine compiled goes on without torch.compile: %s", str(error).strip().splitlines()[0])
                self._can_compile = False
        return super()._decided(tiles_BHWC)
