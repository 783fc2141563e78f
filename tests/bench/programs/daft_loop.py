"""Daft: paths, download, decode, a class of functions that holds our network in eager float32, write_parquet."""

from typing import Any

import daft
import numpy as np
import torch
from daft import DataType, Series, col
from daft.functions import decode_image, download

from tests.bench.programs.arguments import arguments
from unetpp.checkpoint import from_pretrained


@daft.cls(max_concurrency=1)
class Segmenter:
    """Our network as it is trained."""

    def __init__(self, model: str, level: int) -> None:
        self.level = level
        self.model = from_pretrained(model, level).eval()

    @daft.method.batch(return_dtype=DataType.binary(), batch_size=8)
    def masks(self, images: Series) -> list[Any]:
        """Masks as bytes, a byte a pixel."""
        with torch.no_grad():
            x_BHWC = torch.from_numpy(np.stack(images.to_pylist())).float() / 255
            logits_BKHW = self.model(x_BHWC.permute(0, 3, 1, 2).contiguous())[self.level]
            masks_BHW = (logits_BKHW.sigmoid()[:, 0] > 0.5).to(torch.uint8)
        return [mask_HW.numpy().tobytes() for mask_HW in masks_BHW]


if __name__ == "__main__":
    asked = arguments(__doc__)
    segmenter = Segmenter(str(asked.model), asked.level)
    images = daft.from_glob_path(f"{asked.images}/*.png").select("path")
    images = images.with_column("image", decode_image(download(col("path")), mode="RGB"))
    images.select(col("path"), segmenter.masks(col("image")).alias("mask")).write_parquet(str(asked.output))
