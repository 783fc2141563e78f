"""A loop over a torch DataLoader: our network as it is trained, eager float32, NCHW, nothing folded."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.bench.programs.arguments import arguments
from unetpp.checkpoint import from_pretrained


class Folder(Dataset[tuple[str, Tensor]]):
    """Names and images CHW in 0..1."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        image_HWC = np.array(Image.open(self.paths[index]).convert("RGB"))
        return self.paths[index].name, torch.from_numpy(image_HWC).permute(2, 0, 1).float() / 255


if __name__ == "__main__":
    asked = arguments(__doc__)
    asked.output.mkdir(parents=True, exist_ok=True)
    model = from_pretrained(asked.model, asked.level).eval()
    with torch.no_grad():
        for names, x_BCHW in DataLoader(Folder(asked.images), batch_size=8, num_workers=2):
            masks_BHW = (model(x_BCHW)[asked.level].sigmoid()[:, 0] > 0.5).to(torch.uint8) * 255
            for name, mask_HW in zip(names, masks_BHW.numpy(), strict=True):
                Image.fromarray(mask_HW).save(asked.output / name)
