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

from typing import Literal

EngineName = Literal["reference", "torch", "compiled", "openvino", "openvino-bf16", "openvino-int8"]
EngineChoice = Literal["auto", EngineName]
"""auto: compiled where there is a GPU, else openvino."""
Precision = Literal["f32", "bf16", "int8"]

PRECISION: dict[EngineName, Precision] = {
    "reference": "f32",
    "torch": "f32",
    "compiled": "bf16",
    "openvino": "f32",
    "openvino-bf16": "bf16",
    "openvino-int8": "int8",
}
ON_CPU_ONLY: tuple[EngineName, ...] = ("openvino", "openvino-bf16", "openvino-int8")


def resolved(engine: EngineChoice, *, on_gpu: bool) -> EngineName:
    """The engine that is meant where there is a GPU, or none."""
    if engine == "auto":
        return "compiled" if on_gpu else "openvino"
    return engine
