"""Write a labelled set of synthetic microscopy: `unetpp synth --out DIR --num N --kind nuclei|cells|camera16`.

The set is `images/<id>.png`, `masks/<id>.png` (0 and 255; of cells a palette file of ids 0, 1, 2) and `splits.csv` (id,
split, modality). The modalities of a kind alternate, and each is split 70/15/15 into train, val and test. The first n
images are the same whatever `num` is. What is already there with the right bytes is not written again, so that a second
run leaves the set, and its fingerprint, as they are.
"""

import csv
import io
import logging

from jobs import storage
from jobs.contract import SynthConfig, SynthResult
from unetpp.config import SynthKind
from unetpp.errors import ConfigError
from unetpp.images import encode_image, encode_mask
from unetpp.synth import MODALITIES, NUM_CLASSES, Modality, synthesize

logger = logging.getLogger(__name__)

SPLITS = {1: "val", 3: "test", 8: "val", 10: "test", 15: "val", 17: "test"}
"""The split of every 20 images of a modality, by rank; all others are train. Small sets have some of each, too."""


def run(config: SynthConfig) -> SynthResult:
    """Write the set to `out`, `splits.csv` last. ConfigError where `out` holds images or masks of another set."""
    ids = [f"synth-{index:06d}" for index in range(config.num)]
    _refuse_foreign_files(config.out, ids)
    num_written = 0
    for index, id_ in enumerate(ids):
        modality = _modality(config.kind, index)
        image_HWC, mask_HW = synthesize(index, size=config.size, modality=modality, seed=config.seed)
        mask_png = encode_mask(mask_HW, NUM_CLASSES[config.kind])
        num_written += _write_if_new(storage.join(config.out, "images", f"{id_}.png"), encode_image(image_HWC))
        num_written += _write_if_new(storage.join(config.out, "masks", f"{id_}.png"), mask_png)
    num_written += _write_if_new(storage.join(config.out, "splits.csv"), _splits_csv(config.kind, ids))
    logger.info("synthetic set of %d images at %s: %d files written", config.num, config.out, num_written)
    return SynthResult(data_uri=config.out, num_images=config.num)


def _modality(kind: SynthKind, index: int) -> Modality:
    return MODALITIES[kind][index % len(MODALITIES[kind])]


def _splits_csv(kind: SynthKind, ids: list[str]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "split", "modality"])
    for index, id_ in enumerate(ids):
        rank = index // len(MODALITIES[kind])
        table.writerow([id_, SPLITS.get(rank % 20, "train"), _modality(kind, index)])
    return text.getvalue().encode()


def _refuse_foreign_files(out: str, ids: list[str]) -> None:
    """A larger or another set below `out` would be mixed with this one."""
    ours = {f"{folder}/{id_}.png" for folder in ("images", "masks") for id_ in ids}
    for found in storage.list_objects(out, missing_ok=True):
        if found.key.startswith(("images/", "masks/")) and found.key not in ours:
            raise ConfigError(f"{out} already holds {found.key}, which is not of this set; choose another folder")


def _write_if_new(uri: str, content: bytes) -> bool:
    try:
        if storage.read_bytes(uri) == content:
            return False
    except FileNotFoundError:
        pass
    storage.write_bytes(uri, content)
    return True


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("synth")
