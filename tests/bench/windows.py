"""Huge images: are the windows' masks the whole image's, what does a worker hold in memory, which bytes does it read.

    python -m tests.bench.windows --data ../shared/data/dsb2018 --maker ../shared/data/large/make_mosaic.py \\
        --out tests/bench/results/windows.json

For mosaics of 6144 x 6144 (16-bit grey, and RGB) and of 16384 x 16384 (RGB), in a SeaweedFS behind a proxy that counts,
and each level:
`predict` in one process with windows of --window-px, `assemble`, and then

- boxes: in corners, at borders, over joints of windows and anywhere, predicted alone with their margin, from the
  pixels that another reader gives;
- again: a second run with windows of --other-px, pixel by pixel;
- whole: a corner of --whole-px as an image of its own in windows of a quarter, against one forward of all of it;
- memory: the largest resident size of the process and of its decoder;
- bytes that crossed the wire: those of the file's tiles, and others; needed are the tiles that the windows and their
  margins touch, and the report's pictures come on top.

The model is the packaged one, or of few filters that are drawn and never trained (--model drawn): all four levels in
minutes, with masks that are as winding as any.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tifffile
import torch

from jobs import storage, windows
from jobs.manifest import ManifestRow
from tests.bench.setting import setting
from tests.faults.proxy import FaultProxy
from tests.seaweedfs import SeaweedFS
from unetpp.checkpoint import read_pretrained, save_pretrained
from unetpp.config import ModelConfig, ValueRange
from unetpp.measuring import logits_by_level
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Predictor
from unetpp.tiles import Box

BOX_PX, NUM_BOXES = 160, 64
DRAWN = "drawn"
KINDS = {"grey": ("--kind", "fluo", "--u16"), "colour": ()}
EVERY_S = 0.2


def mosaic(arguments: argparse.Namespace, folder: Path, kind: str, side: int) -> Path:
    """A large image made of the data set's test images; made once."""
    path = folder / f"{kind}-{side}.tif"
    words = [sys.executable, arguments.maker, arguments.data, path, str(side), "--split", "test", *KINDS[kind]]
    if not path.exists():
        subprocess.run(words, check=True)
    return path


def drawn_model(path: Path, model_dir: Path) -> None:
    """Save a model of few filters, drawn with a seed; the middle of what a head says of an image is its threshold."""
    torch.manual_seed(0)
    config = ModelConfig(filters=(4, 8, 16, 32, 64), value_range=ValueRange(uint16=(0, 4080)))
    model = UNetPlusPlus(config).eval()
    for level, logits_HWK in logits_by_level(model, tifffile.imread(path)[:1024, :1024]).items():
        low, high = np.quantile(logits_HWK, (0.02, 0.98))
        model.heads[str(level)].bias.data -= (low + high) / 2
    save_pretrained(model, model_dir)


def measured(words: list[str]) -> dict[str, Any]:
    """Run `unetpp words`, and say how long it took and what it and its decoders held in memory at most, MiB."""
    started, peaks = time.monotonic(), {"process": 0, "decoder": 0}
    with psutil.Popen(
        [sys.executable, "-m", "jobs.cli", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        while process.poll() is None:
            for member in (process, *_children(process)):
                name = "process" if member == process else "decoder"
                peaks[name] = max(peaks[name], _peak_mib(member.pid))
            time.sleep(EVERY_S)
    assert process.returncode == 0, words
    return {"seconds": round(time.monotonic() - started, 1), "peak_mib": peaks}


def _peak_mib(pid: int) -> int:
    """The largest resident size of a process since it began; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)


def _children(process: psutil.Process) -> list[psutil.Process]:
    """Its decoders: not what is its copy still, about to become one."""
    try:
        return [child for child in process.children() if "jobs.guarded_child" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def chosen_boxes(height: int, width: int, window_px: int) -> list[Box]:
    """Seeded boxes: the corners, places at the borders, over joints of two and four windows, and anywhere."""
    rng = np.random.default_rng(height)
    ends = [0, height - BOX_PX], [0, width - BOX_PX]
    places = list(itertools.product(*ends))
    joints = [[n * window_px - BOX_PX // 2 for n in range(1, side // window_px)] or [0] for side in (height, width)]
    while len(places) < NUM_BOXES:
        anywhere = [int(rng.integers(side - BOX_PX + 1)) for side in (height, width)]
        joint = [int(rng.choice(of_axis)) for of_axis in joints]
        end = [int(rng.choice(of_axis)) for of_axis in ends]
        kinds = [joint, anywhere, [joint[0], anywhere[1]], [anywhere[0], end[1]], [end[0], joint[1]]]
        y, x = kinds[len(places) % len(kinds)]
        places.append((y, x))
    return [Box(y, x, y + BOX_PX, x + BOX_PX) for y, x in places]


def wrong_pixels(image: np.ndarray, mask_HW: np.ndarray, predictor: Predictor, window_px: int) -> dict[str, int]:
    """How many pixels of the boxes differ from what each gives alone, in a cut that is no window of ours."""
    num_wrong = num_foreground = 0
    margin = -(-predictor.config.halo_px // 64) * 64
    boxes = chosen_boxes(image.shape[0], image.shape[1], window_px)
    for box in boxes:
        y0, x0 = ((max(0, start - margin)) // 64 * 64 for start in (box.y0, box.x0))
        (alone_HW,) = predictor([np.array(image[y0 : box.y1 + margin, x0 : box.x1 + margin])])
        seen_HW = alone_HW[box.y0 - y0 : box.y1 - y0, box.x0 - x0 : box.x1 - x0]
        num_wrong += int(((mask_HW[box.slices] > 0) != (seen_HW > 0)).sum())
        num_foreground += int((seen_HW > 0).sum())
    return {
        "num_boxes": len(boxes),
        "num_pixels": len(boxes) * BOX_PX**2,
        "num_foreground": num_foreground,
        "num_wrong": num_wrong,
    }


def tiles_of(page: tifffile.TiffPage, box: Box) -> list[int]:
    """The numbers of the tiles that a box touches."""
    num_columns = -(-page.imagewidth // page.tilewidth)
    rows = range(box.y0 // page.tilelength, -(-box.y1 // page.tilelength))
    columns = range(box.x0 // page.tilewidth, -(-box.x1 // page.tilewidth))
    return [y * num_columns + x for y in rows for x in columns]


def needed_bytes(page: tifffile.TiffPage, window_px: int, predictor: Predictor) -> int:
    """Bytes of the tiles that the windows and their margins touch, each once a window."""
    boxes = windows.grid(page.imagelength, page.imagewidth, window_px)
    total = 0
    for box in boxes:
        row = ManifestRow(
            *(0, 0, "", "", 0, "", -1),
            *(box.y0, box.x0, box.height, box.width, len(boxes), window_px),
            *(page.imagelength, page.imagewidth, 0, None),
        )
        part = windows.reading(row, predictor.config)
        total += sum(page.databytecounts[n] for n in tiles_of(page, box if part is None else part.outer))
    return total


def bytes_of_tiles(page: tifffile.TiffPage, ranges: list[tuple[int, int]]) -> int:
    """Of some ranges of the file, the bytes that belong to tiles that lie in them whole."""
    tiles = sorted(zip(page.dataoffsets, page.databytecounts, strict=True))
    total = 0
    for start, stop in ranges:
        for offset, size in tiles[bisect_left(tiles, (start, 0)) :]:
            if offset + size > stop:
                break
            total += size
    return total


def one_run(
    arguments: argparse.Namespace, folder: Path, proxy: FaultProxy, path: Path, predictor: Predictor, window_px: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Predict and assemble an image: what it took, and the mask."""
    level, page = predictor.level, tifffile.TiffFile(path).pages.first
    output, mask = folder / f"{path.stem}-L{level}-{window_px}", folder / f"{path.stem}-L{level}-{window_px}.tif"
    words = ["--model", arguments.model, "--level", str(level), "--input", f"s3://archive/{path.stem}"]
    words += ["--window-px", str(window_px), "--backend", "inline", "--threads", "1", "--write", "parquet"]
    proxy.bodies.clear()
    proxy.ranges.clear()
    num_windows = len(windows.grid(page.imagelength, page.imagewidth, window_px))
    run: dict[str, Any] = {"window_px": window_px, "num_windows": num_windows}
    run |= measured(["predict", *words, "--output", str(output)])
    ranges = [(start, stop) for where, start, stop in proxy.ranges if path.name in where]
    num_read, of_tiles = proxy.bytes_of("GET", path.name), bytes_of_tiles(page, ranges)
    run["num_requests"] = len(proxy.bodies)
    run["bytes"] = {"file": path.stat().st_size, "needed": needed_bytes(page, window_px, predictor)}
    run["bytes"] |= {"of_tiles": of_tiles, "others": num_read - of_tiles}
    run["assemble"] = measured(["assemble", str(output), path.name, "--out", str(mask)])
    return run, tifffile.imread(mask)


def one_level(arguments: argparse.Namespace, folder: Path, proxy: FaultProxy, path: Path, level: int) -> dict[str, Any]:
    """Predict, assemble and compare one image at one level."""
    predictor = Predictor.from_pretrained(arguments.model, level=level)
    first, mask_HW = one_run(arguments, folder, proxy, path, predictor, arguments.window_px)
    image = tifffile.imread(path)
    shown: dict[str, Any] = {
        "level": level,
        "foreground": round(float((mask_HW > 0).mean()), 4),
        "runs": [first],
        "boxes": wrong_pixels(image, mask_HW, predictor, arguments.window_px),
        "whole": whole(arguments, folder, image, level),
    }
    if arguments.other_px:
        second, again_HW = one_run(arguments, folder, proxy, path, predictor, arguments.other_px)
        shown["runs"].append(second)
        shown["again"] = {"num_pixels": mask_HW.size, "num_wrong": int((mask_HW != again_HW).sum())}
    return shown


def whole(arguments: argparse.Namespace, folder: Path, image: np.ndarray, level: int) -> dict[str, Any]:
    """A corner as an image of its own: windows against one forward of all of it."""
    side = arguments.whole_px
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, output, mask = (os.path.join(place, name) for name in ("source", "output", "mask.tif"))
        os.mkdir(source)
        corner = os.path.join(source, "corner.tif")
        tifffile.imwrite(corner, image[:side, :side], tile=(256, 256), compression="deflate", bigtiff=True)
        words = ["--model", arguments.model, "--level", str(level), "--input", source, "--output", output]
        words += ["--window-px", str(side // 4), "--backend", "inline", "--threads", "1", "--write", "parquet"]
        measured(["predict", *words])
        measured(["assemble", output, "corner.tif", "--out", mask])
        seen_HW = tifffile.imread(mask)
    predictor = Predictor.from_pretrained(arguments.model, level=level, tile_px=side)
    (whole_HW,) = predictor([image[:side, :side]])
    return {"side": side, "num_wrong": int(((seen_HW > 0) != (whole_HW > 0)).sum())}


def levels_of(arguments: argparse.Namespace) -> list[int]:
    """Those that were asked for, else all that the model has a head of."""
    if arguments.levels is None:
        return list(read_pretrained(arguments.model).model.head_levels)
    return [int(level) for level in arguments.levels.split(",")]


def measure(arguments: argparse.Namespace, folder: Path, server: SeaweedFS) -> Iterator[dict[str, Any]]:
    """Make the images, put them into the store, and run everything."""
    proxy, model = FaultProxy(server.url), arguments.model
    for name in arguments.images.split(","):
        kind, side = name.split("-")
        path = mosaic(arguments, arguments.folder or folder, kind, int(side))
        if model == DRAWN:
            arguments.model = str(folder / f"{DRAWN}-{name}")
            drawn_model(path, Path(arguments.model))
        os.environ["AWS_ENDPOINT_URL"] = server.url
        storage.upload_file(path, f"s3://archive/{path.stem}/{path.name}")
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        for level in levels_of(arguments):
            yield {"image": name, "model": model} | one_level(arguments, folder, proxy, path, level)
    proxy.close()


def main() -> None:
    """Measure, and write the result: beside what the file has of other images, models and levels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--maker", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default=DRAWN)
    parser.add_argument("--levels", default=None, help="such as 1,2; default: all that the model has a head of")
    parser.add_argument("--images", default="grey-6144,colour-6144,colour-16384")
    parser.add_argument("--window-px", type=int, default=2048)
    parser.add_argument("--other-px", type=int, default=3072, help="0: no second run")
    parser.add_argument("--whole-px", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where the images are kept between calls; default: nowhere")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text())["measured"]
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        store.mkdir()
        with SeaweedFS(store) as server:
            os.environ.update(server.environment, AWS_EC2_METADATA_DISABLED="true")
            for one in measure(arguments, Path(folder), server):
                same = [one[name] for name in ("image", "model", "level")]
                found = [old for old in found if [old[name] for name in ("image", "model", "level")] != same] + [one]
                lines = ",\n".join(map(json.dumps, found))
                arguments.out.write_text(f'{{"setting": {json.dumps(setting())}, "measured": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
