"""What this machine computes on."""

import math
import os
import socket
from pathlib import Path

from unetpp.errors import DeviceError

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of GPUs make; without one of them there is no need to ask torch, which takes seconds to load."""
CPU_INFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
CUDA_BYTES = 768 << 20
"""Of a GPU's memory that each process takes beside what torch allocates."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""What torch, CUDA, cuBLAS and cuDNN say."""


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


def share_gpu(share: float) -> None:
    """Take no more than this share of the memory of a GPU, if there is one: the rest is for those who share it."""
    if share == 1 or not has_gpu():
        return
    import torch

    _, total_bytes = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(max(share / 2, share - CUDA_BYTES / total_bytes))


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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what torch means. DeviceError where it means that the GPU is broken: it then fails at anything.

    Only what torch's own allocator raises has a type; CUDA and its libraries just say so.
    """
    if any(words in str(error) for words in OUT_OF_MEMORY):
        return True
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as broken:
            raise DeviceError(
                f"the GPU of {socket.gethostname()} computes nothing more for this process "
                f"({str(broken).strip().splitlines()[0]}): see nvidia-smi and dmesg (Xid) there, and start again"
            ) from error
    return False
