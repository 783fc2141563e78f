"""Which engines there are, as data. Imports neither torch nor numpy.

| engine | computes on | precision | what it is |
|---|---|---|---|
| reference | CPU, GPU | f32 | eager torch as everybody writes it |
| torch | CPU, GPU | f32 | eager torch made right: folded, channels_last, freed memory kept |
| compiled | GPU, CPU | bf16 | the same by torch.compile |
| openvino | CPU | f32 | an OpenVINO graph; needs no torch |
| openvino-bf16 | CPU | bf16 | the same graph in half the bits, on CPUs that have instructions for them |
| openvino-int8 | CPU | int8 | a quantised one, which `unetpp quantise` made and measured |

Engines of one precision make one model's masks: they differ in pixels that are undecided to the last bits, if at all.
"""

from collections.abc import Collection
from typing import Literal

EngineName = Literal["reference", "torch", "compiled", "openvino", "openvino-bf16", "openvino-int8"]
EngineChoice = Literal["auto", EngineName]
"""auto: compiled where there is a GPU, openvino-bf16 where the CPU has AMX, else openvino."""
Precision = Literal["f32", "bf16", "int8"]

PRECISION: dict[EngineName, Precision] = {
    "reference": "f32",
    "torch": "f32",
    "compiled": "bf16",
    "openvino": "f32",
    "openvino-bf16": "bf16",
    "openvino-int8": "int8",
}
AUTO_PRECISIONS: tuple[Precision, ...] = ("f32", "bf16")
"""Of the engines that `auto` may mean, on one machine or another."""
ON_CPU_ONLY: tuple[EngineName, ...] = ("openvino", "openvino-bf16", "openvino-int8")


def auto_engines(*, on_gpu: bool, cpu_flags: Collection[str]) -> tuple[EngineName, ...]:
    """What `auto` may mean on a machine, the fastest first; one of each precision.

    AMX computes bfloat16 several times as fast as float32. Other CPUs with instructions for it gain little or nothing:
    they compute in it only to go on with masks that were.
    """
    if on_gpu:
        return "compiled", "torch"
    if "amx_bf16" in cpu_flags:
        return "openvino-bf16", "openvino"
    if "avx512_bf16" in cpu_flags:
        return "openvino", "openvino-bf16"
    return ("openvino",)
