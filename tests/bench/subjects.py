"""What is measured: networks with random weights, images of one size cut out of a real set, and plain inference.

    python -m tests.bench.subjects --model <folder> --filters 32 64 128 256 512 --data <dsb2018>

makes such a network; by a process of its own, so that no process that measures has computed before.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from unetpp.checkpoint import from_pretrained, save_pretrained
from unetpp.config import Level, ModelConfig
from unetpp.model import UNetPlusPlus

Picture = NDArray[np.uint8]
"""HWC, RGB."""

PAPER = (32, 64, 128, 256, 512)
"""The paper's widths."""
NUM_CALIBRATION = 8


def crops(data: Path, num: int, side_px: int = 256, split: str = "test") -> list[Picture]:
    """The first squares of so many pixels of a split's images, by name; from the start again where they are few."""
    with (data / "splits.csv").open() as file:
        ids = sorted(row["id"] for row in csv.DictReader(file) if row["split"] == split)
    found: list[Picture] = []
    for id_ in ids:
        image_HWC = np.array(Image.open(data / "images" / f"{id_}.png").convert("RGB"))
        height, width = image_HWC.shape[:2]
        for y in range(0, height - side_px + 1, side_px):
            for x in range(0, width - side_px + 1, side_px):
                found.append(np.ascontiguousarray(image_HWC[y : y + side_px, x : x + side_px]))
        if len(found) >= num:
            break
    assert found, f"no image of split {split} has both sides of {side_px} px"
    return [found[number % len(found)] for number in range(num)]


def write_images(folder: Path, images: Sequence[Picture]) -> None:
    """PNGs named by number."""
    folder.mkdir(parents=True)
    for number, image_HWC in enumerate(images):
        Image.fromarray(image_HWC).save(folder / f"{number:05d}.png")


def mosaic(images: Sequence[Picture], side_px: int) -> Picture:
    """A square image of so many pixels, tiled with smaller ones."""
    small = images[0].shape[0]
    num = -(-side_px // small)
    rows = [[images[(y * num + x) % len(images)] for x in range(num)] for y in range(num)]
    return np.ascontiguousarray(np.concatenate([np.concatenate(row, 1) for row in rows])[:side_px, :side_px])


def random_network(filters: Sequence[int], images: Sequence[Picture], seed: int = 0) -> UNetPlusPlus:
    """A network of four levels: He's weights, and the statistics of normalisation that the images have in it."""
    torch.manual_seed(seed)
    model = UNetPlusPlus(ModelConfig(level=4, filters=tuple(filters)))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all that it sees
    model.train()
    with torch.no_grad():
        for image_HWC in images[:NUM_CALIBRATION]:
            model(torch.from_numpy(image_HWC).permute(2, 0, 1)[None].float() / 255)
    return model.eval()


def write_random_model(folder: Path, filters: Sequence[int], images: Sequence[Picture]) -> None:
    """`random_network` as a model folder."""
    save_pretrained(random_network(filters, images), folder)


def eager(model_dir: Path, level: Level) -> Callable[[Picture], Picture]:
    """Inference as everyone writes it: eager float32, NCHW, nothing folded, sigmoid above one half."""
    model = from_pretrained(model_dir, level)

    @torch.no_grad()
    def mask_of(image_HWC: Picture) -> Picture:
        x_BCHW = torch.from_numpy(image_HWC).permute(2, 0, 1).unsqueeze(0).float().contiguous() / 255
        if (gamma := model.config.gamma) != 1:
            x_BCHW = x_BCHW.pow(gamma)
        probability_BKHW = model(x_BCHW)[level].sigmoid()
        return (probability_BKHW[0, 0] > 0.5).to(torch.uint8).numpy()

    return mask_of


def main() -> None:
    """Write a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--filters", type=int, nargs=5, default=PAPER)
    parser.add_argument("--data", type=Path, required=True)
    asked = parser.parse_args()
    write_random_model(asked.model, asked.filters, crops(asked.data, NUM_CALIBRATION))


if __name__ == "__main__":
    main()
