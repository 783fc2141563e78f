"""What this machine computes on."""

import os
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of GPUs make; without one of them there is no need to ask torch, which takes seconds to load."""
CPU_INFO = Path("/proc/cpuinfo")


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by the names of Linux (`amx_bf16`, `avx512_bf16`, ...); elsewhere nothing is known.

    AMX is left out where ONEDNN_MAX_CPU_ISA keeps torch and OpenVINO from it: bfloat16 then takes longer than float32.
    """
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split()
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    has_amx = most in ("ALL", "DEFAULT") or "AMX" in most
    return frozenset(flag for flag in flags if has_amx or not flag.startswith("amx"))
