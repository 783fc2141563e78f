"""What this machine computes on."""

import math
import os
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of GPUs make; without one of them there is no need to ask torch, which takes seconds to load."""
CPU_INFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


def num_cpus() -> int:
    """CPUs that this process may keep busy: those it is bound to, or its container's share of their time where less."""
    number = len(os.sched_getaffinity(0))
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # of control groups v2 and v1
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
        except OSError:
            continue
        if quota.isdecimal():  # else it is max, or -1
            number = min(number, math.ceil(int(quota) / int(period)))
    return number


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
