"""What this machine computes on."""

from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What the drivers of GPUs make; without one of them there is no need to ask torch, which takes seconds to load."""


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return False
    import torch

    return torch.cuda.is_available()
