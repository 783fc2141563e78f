"""Engines: each gives the masks of the reference, in its precision, and says what it cannot do."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch._inductor import config as inductor

from tests.cpu import HAS_BF16
from unetpp import devices
from unetpp.checkpoint import arrays_of
from unetpp.compiled_engine import CompiledEngine
from unetpp.config import ModelConfig
from unetpp.devices import cpu_flags
from unetpp.engine_names import PRECISION, auto_engines
from unetpp.errors import ConfigError, DeviceError
from unetpp.model import UNetPlusPlus
from unetpp.predictor import load_engine
from unetpp.torch_engine import ReferenceEngine, TorchEngine, scale

CORE = (slice(8, 60), slice(0, 90))
KINDS: list[dict[str, Any]] = [
    {"level": 1, "num_classes": 3, "gamma": 0.5},
    {"level": 2, "norm": "none", "deep_supervision": False, "mean": (0.1, 0.2, 0.3)},
    {"level": 3, "upsample": "bilinear", "num_classes": 3},
    {"level": 4, "upsample": "nearest", "temperature": {4: 1.7}},
    {"level": 4, "in_channels": 1, "value_range": {"uint16": (0, 4095)}},
]


def network(**kind: Any) -> UNetPlusPlus:
    """A small network with normalisation statistics that are not those of a new one."""
    torch.manual_seed(1)
    model = UNetPlusPlus(ModelConfig.model_validate({"filters": (8, 8, 12, 12, 16), **kind}))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def engine(name: Any, model: UNetPlusPlus, mode: Any = "fast", **how: Any) -> Any:
    return load_engine(name, model.config, arrays_of(model), mode, threads=1, **how)


def tiles(pixel_type: str = "uint8", channels: int = 3, num: int = 2) -> Any:
    """Tiles of noise, 64 x 96."""
    values = np.random.default_rng(2).random((num, 64, 96, channels), np.float32)
    return values if pixel_type == "float32" else (values * np.iinfo(pixel_type).max).astype(pixel_type)


@pytest.mark.parametrize("name", ["torch", "openvino"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"L{kind['level']}")
@pytest.mark.parametrize(("pixel_type", "mode"), [("uint8", "fast"), ("uint16", "fast"), ("float32", "accurate")])
def test_masks_margins_and_probabilities_are_those_of_the_reference(
    name: str, kind: dict[str, Any], pixel_type: str, mode: Any
) -> None:
    model = network(**kind)
    tiles_BHWC = tiles(pixel_type, model.config.in_channels)
    how = {"flips": mode == "accurate", "probability": True}
    wanted, wanted_stats = engine("reference", model, mode, **how)(tiles_BHWC, CORE)
    seen, stats = engine(name, model, mode, **how)(tiles_BHWC, CORE)
    assert seen.shape == wanted.shape == (2, 52, 90)
    assert (seen != wanted).mean() <= 1e-3
    for one, other in zip(stats, wanted_stats, strict=True):
        assert one.finite
        assert one.margin == pytest.approx(other.margin, abs=1e-5)
        assert one.probability_HW is not None
        assert other.probability_HW is not None
        assert np.abs(one.probability_HW.astype(int) - other.probability_HW).max() <= 1


@pytest.mark.parametrize("name", ["reference", "torch", "openvino"])
def test_a_network_that_gives_nan_says_so(name: str) -> None:
    model = network(level=1)
    model.heads["1"].bias.data[:] = torch.nan
    _, stats = engine(name, model)(tiles(), CORE)
    assert [each.finite for each in stats] == [False, False]


@pytest.mark.parametrize("name", ["reference", "torch", "openvino"])
def test_other_pixels_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="int32"):
        engine(name, network(level=1))(tiles().astype(np.int32), CORE)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    ],
)
def test_what_torch_says_of_memory_is_a_memory_error(error: Exception) -> None:
    class Small(ReferenceEngine):
        def _decided(self, tiles_BHWC: torch.Tensor) -> list[torch.Tensor]:
            raise error

    with pytest.raises(MemoryError, match="tiles of shape"):
        Small(network(level=1), "fast")(tiles(), CORE)

    class Late(ReferenceEngine):
        def _downloaded(self, found: list[torch.Tensor], tiles: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
            def wait() -> list[torch.Tensor]:
                raise error

            return wait

    read = Late(network(level=1), "fast").start(tiles(), CORE)
    with pytest.raises(MemoryError, match="tiles of shape"):
        read()


def test_a_broken_gpu_is_told_from_an_image_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for ...")

    def fails(*_: object) -> Any:
        raise error

    class Failing(ReferenceEngine):
        _decided = fails

    failing = Failing(network(level=1), "fast")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(torch.AcceleratorError):
        failing(tiles(), CORE)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(DeviceError, match=r"nothing more for this process .*an illegal memory access was"):
        failing(tiles(), CORE)


@pytest.mark.parametrize("name", ["reference", "torch", "openvino"])
def test_what_was_started_is_what_a_call_gives_in_any_order(name: str) -> None:
    loaded = engine(name, network(level=1), probability=True)
    batches = [tiles(), 255 - tiles()]
    (one, _), (other, _) = (loaded(batch, CORE) for batch in batches)
    first, second = (loaded.start(batch, CORE) for batch in batches)
    assert np.array_equal(second()[0], other)
    assert np.array_equal(first()[0], one)
    assert not np.array_equal(one, other)


def test_an_engine_leaves_its_model_as_it_was() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    TorchEngine(model, "fast")(tiles(), CORE)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("on_gpu", "flags", "wanted"),
    [
        (True, {"avx512_bf16", "amx_bf16"}, ("compiled", "torch")),
        (False, {"avx512_bf16", "amx_bf16"}, ("openvino-bf16", "openvino")),
        (False, {"avx512f", "avx512_bf16"}, ("openvino", "openvino-bf16")),
        (False, set(), ("openvino",)),
    ],
)
def test_auto_is_the_fastest_engine_of_a_machine(on_gpu: bool, flags: set[str], wanted: tuple[str, ...]) -> None:
    assert auto_engines(on_gpu=on_gpu, cpu_flags=flags) == wanted
    assert len({PRECISION[name] for name in wanted}) == len(wanted)


@pytest.mark.parametrize(
    ("most", "has_amx"), [(None, True), ("all", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE_BF16", False)]
)
def test_cpu_flags_are_those_that_linux_tells_and_onednn_is_allowed(
    most: str | None, has_amx: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nflags\t\t: fpu sse2 amx_bf16\nbugs\t\t:\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    monkeypatch.setattr(devices, "CPU_INFO", told)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    if most is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert cpu_flags() == {"fpu", "sse2", *(["amx_bf16"] if has_amx else [])}
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "absent")
    assert cpu_flags() == frozenset()


@pytest.mark.parametrize(("share", "gib", "told"), [(0.25, 80, [0.240625]), (0.25, 2, [0.125]), (1.0, 80, [])])
def test_those_who_share_a_gpu_leave_each_other_memory(
    share: float, gib: int, told: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, gib << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", seen.append)
    devices.share_gpu(share)
    assert seen == told


def test_bf16_masks_are_the_references_but_for_undecided_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(level=4)
    if not HAS_BF16:
        with pytest.raises(ConfigError, match="no instructions for bf16; take engine openvino"):
            engine("openvino-bf16", model)
        return
    wanted, _ = engine("reference", model)(tiles(), CORE)
    seen, stats = engine("openvino-bf16", model, probability=True)(tiles(), CORE)
    assert (seen != wanted).mean() < 0.02
    assert all(stat.finite and stat.probability_HW is not None for stat in stats)
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(ConfigError, match="no instructions for bf16; take engine openvino"):
        engine("openvino-bf16", model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_masks_are_the_references_but_for_undecided_pixels(caplog: pytest.LogCaptureFixture) -> None:
    model = network(level=2)
    wanted, _ = engine("reference", model)(tiles(num=3), CORE)
    compiled = engine("compiled", model, probability=True)
    seen, stats = compiled(tiles(num=3), CORE)
    assert "goes on without torch.compile" not in caplog.text
    assert (seen != wanted).mean() < 0.02
    assert all(stat.finite and stat.probability_HW is not None for stat in stats)


def dim_network(dim_BHWC: Any) -> tuple[UNetPlusPlus, torch.Tensor]:
    """A network that makes much of the small differences between the pixels of dim images; and x_BCHW of these."""
    model = network(level=1, norm="none")
    reads, head = model.nodes["x00"][0], model.heads["1"]
    x_BCHW = scale(torch.from_numpy(dim_BHWC), model.config)
    reads.weight *= 100
    reads.bias -= reads((x_BCHW - model.mean) / model.std).mean((0, 2, 3))
    head.bias -= model(x_BCHW)[1].median()
    return model, x_BCHW


@torch.no_grad()
def test_bfloat16_tells_the_values_of_dim_images_apart() -> None:
    dim_BHWC = tiles("uint16") // 100
    model, _ = dim_network(dim_BHWC)
    wanted, _ = ReferenceEngine(model, "fast", threads=1)(dim_BHWC, CORE)
    compiled = CompiledEngine(model, "fast", threads=1)
    compiled._can_compile = False
    seen, _ = compiled(dim_BHWC, CORE)
    assert 0.4 < wanted.mean() < 0.6
    assert (seen != wanted).mean() < 0.02


@torch.no_grad()
def test_autocast_tells_the_values_of_dim_images_apart() -> None:
    model, x_BCHW = dim_network(tiles("uint16") // 100)
    wanted = model(x_BCHW)[1] > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert model.nodes["x00"][0](x_BCHW).dtype == torch.bfloat16
        seen = model(x_BCHW)[1] > 0
    assert (seen != wanted).float().mean() < 0.02


def test_openvino_computes_images_of_more_than_8_bits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Core(ov.Core):
        def get_property(self, *_: Any) -> Any:
            return ["FP32", "BF16"]

        def compile_model(self, model: Any, device: Any, settings: Any) -> Any:
            asked.append(settings["INFERENCE_PRECISION_HINT"])
            return super().compile_model(model, device, settings | {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(ov, "Core", Core)
    on_bf16 = engine("openvino-bf16", network(level=1))
    for pixel_type in ("uint8", "uint16", "float32"):
        on_bf16(tiles(pixel_type), CORE)
    assert asked == ["bf16", "f32", "f32"]


def test_what_cannot_be_compiled_is_computed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    model = network(level=1)
    caplog.set_level(logging.WARNING)
    compiled = CompiledEngine(model, "fast", threads=1)
    seen, _ = compiled(tiles(num=1)[:, :32, :48], (slice(None), slice(None)))
    assert seen.shape == (1, 32, 48)
    assert "goes on without torch.compile" in caplog.text


def test_what_cannot_be_recorded_is_computed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU: tiles that come again are to become a CUDA graph, which fails."""
    caplog.set_level(logging.WARNING)
    compiled = CompiledEngine(network(level=1), "fast", threads=1)
    compiled._can_compile, compiled._can_record = False, True
    seen = []

    def refusing(tiles_BHWC: torch.Tensor) -> Any:
        seen.append(tiles_BHWC.shape)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(compiled, "_recorded", refusing)
    masks = [compiled(tiles(num=num), CORE)[0] for num in (1, 2, 2, 2)]
    assert seen == [(2, 64, 96, 3)]
    assert np.array_equal(masks[1], masks[3])
    assert "engine compiled goes on without CUDA graphs: CUDA error" in caplog.text


def test_what_is_recorded_is_replayed_for_tiles_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that computes as it is replayed: into the same memory every time."""
    compiled = CompiledEngine(network(level=1), "fast", threads=1)
    compiled._can_compile, compiled._can_record = False, True

    class Replaying:
        def __init__(self, tiles_BHWC: torch.Tensor) -> None:
            self.graph, self.tiles_BHWC, self.num = self, tiles_BHWC, 0
            self.found = compiled._computed(tiles_BHWC)

        def replay(self) -> None:
            self.num += 1
            for there, here in zip(self.found, compiled._computed(self.tiles_BHWC), strict=True):
                there.copy_(here)

    monkeypatch.setattr(compiled, "_recorded", Replaying)
    batches = [tiles(), 255 - tiles()]
    wanted = compiled(batches[0], CORE)[0]
    assert not compiled._graphs
    seen = [compiled(batch, CORE)[0].copy() for batch in [*batches, batches[0]]]
    ((_, graph),) = compiled._graphs.items()
    assert graph.num == 3  # type: ignore[attr-defined]
    assert np.array_equal(seen[0], wanted)
    assert np.array_equal(seen[2], wanted)
    assert not np.array_equal(seen[1], wanted)
    compiled._free()
    assert not compiled._graphs
    assert np.array_equal(compiled(batches[0], CORE)[0], wanted)
