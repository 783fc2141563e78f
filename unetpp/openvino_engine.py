"""Engines of OpenVINO, on CPUs. Imports no torch."""

import threading
from typing import Any

import numpy as np
import openvino as ov

from unetpp.config import ModelConfig
from unetpp.engines import Engine, Masks, Mode, Pixels, TileStats
from unetpp.errors import ConfigError
from unetpp.openvino_graph import graph


class OpenVINOEngine(Engine):
    """Computes a network of `unetpp.openvino_graph`; one graph a pixel type, any number and size of tiles.

    Modes and flips as of `torch_engine.ReferenceEngine`. threads: of a forward; None: every core. bf16: compute
    images of 8 bits in it, others in float32, since its first convolution cannot be left in float32 alone (see
    `unetpp.model.FileValues`); ConfigError where the CPU has no instructions for bf16.
    """

    def __init__(
        self,
        network: ov.Model,
        config: ModelConfig,
        mode: Mode,
        *,
        threads: int | None = None,
        flips: bool = False,
        probability: bool = False,
        bf16: bool = False,
    ) -> None:
        self._core = ov.Core()
        if bf16 and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ConfigError("engine openvino-bf16: this CPU has no instructions for bf16; take engine openvino")
        self.batch_tiles = 1
        self.probability = probability
        self._network = network
        self._config = config
        self._mode: Mode = mode
        self._flips = flips
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Two processes would pin themselves to the same core.
            "ENABLE_CPU_PINNING": False,
            # Of every shape of tiles it would keep its kernels, up to a GiB of them, and save no time.
            "CPU_RUNTIME_CACHE_CAPACITY": 0,
        } | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
        self._bf16 = bf16
        self._requests: dict[str, ov.InferRequest] = {}
        self._lock = threading.Lock()

    def __call__(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> Masks:
        """See `Engine`."""
        with self._lock:
            found = self._infer(np.ascontiguousarray(tiles_BHWC))
            mask_BHW, margin_BHW, *eight_BHW = [np.array(found[n][:, *core]) for n in range(2 + self.probability)]
        margins = margin_BHW.mean((1, 2), dtype=np.float64).tolist()
        eights = list(eight_BHW[0]) if self.probability else [None] * len(margins)
        finite = np.isfinite(margins).tolist()
        return mask_BHW, [TileStats(*each) for each in zip(finite, margins, eights, strict=True)]

    def _infer(self, tiles_BHWC: Pixels) -> Any:
        request = self._request(str(tiles_BHWC.dtype))
        try:
            return request.infer([tiles_BHWC], share_inputs=True)
        except RuntimeError as error:
            if "alloc" in str(error):
                raise MemoryError(f"tiles of shape {tiles_BHWC.shape}") from None
            raise

    def _request(self, pixel_type: str) -> ov.InferRequest:
        if pixel_type not in self._requests:
            around = graph(
                self._network, self._config, self._mode, pixel_type, flips=self._flips, probability=self.probability
            )
            precision = "bf16" if self._bf16 and pixel_type == "uint8" else "f32"
            settings = self._settings | {"INFERENCE_PRECISION_HINT": precision}
            self._requests[pixel_type] = self._core.compile_model(around, "CPU", settings).create_infer_request()
        return self._requests[pixel_type]
