"""Lets torchvision's build of PyPI be imported beside torch's CPU build, which cannot load its compiled operators.

Two operators are asked for while it is imported; they are declared here and never called. Import this module first.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
