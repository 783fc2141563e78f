"""Huge images: are the windows' masks the whole image's, what does a worker hold in memory, which bytes does it read.

    python -m tests.bench.windows --data ../shared/data/dsb2018 --maker ../shared/data/large/make_mosaic.py \\
        --out tests/bench/results/windows.json

For a 6144 x 6144 16-bit and a 16384 x 16384 RGB mosaic, in a SeaweedFS behind a proxy that counts, and each level:
`predict` in one process with windows of --window-px, `assemble`, and then

- boxes: in corners, at borders, over joints of windows and anywhere, predicted alone with their margin, from the
  pixels that another reader gives;
- again: a second run with windows of --other-px, pixel by pixel;
- whole: a corner of --whole-px as an image of its own in windows of a quarter, against one forward of all of it;
- memory: the largest resident size of the process and of its decoder; bytes: what crossed the wire (for a few windows
  again, for the report's pictures), and what was needed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
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
from unetpp.predictor import Predictor
from unetpp.spans import BLOCK_BYTES
from unetpp.tiles import Box

BOX_PX, NUM_BOXES = 160, 64
EVERY_S = 0.05


def mosaic(arguments: argparse.Namespace, folder: Path, side: int, *options: str) -> Path:
    """A large image made of the data set's test images; made once."""
    path = folder / f"mosaic-{side}.tif"
    if not path.exists():
        subprocess.run([sys.executable, arguments.maker, arguments.data, path, str(side), *options], check=True)
    return path


def measured(words: list[str]) -> dict[str, Any]:
    """Run `unetpp words`, and say how long it took and what it and its decoders held in memory at most, MiB."""
    started, peaks = time.monotonic(), {"process": 0, "decoder": 0, "together": 0}
    with psutil.Popen(
        [sys.executable, "-m", "jobs.cli", *words], env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        while process.poll() is None:
            sizes = {"process": 0, "decoder": 0}
            for member, name in ((process, "process"), *((child, "decoder") for child in _children(process))):
                try:
                    sizes[name] = max(sizes[name], member.memory_info().rss >> 20)
                except psutil.NoSuchProcess:
                    continue
            for name, size in {**sizes, "together": sum(sizes.values())}.items():
                peaks[name] = max(peaks[name], size)
            time.sleep(EVERY_S)
    assert process.returncode == 0, words
    return {"seconds": round(time.monotonic() - started, 1), "peak_mib": peaks}


def _children(process: psutil.Process) -> list[psutil.Process]:
    """Its decoders: not what is its copy still, about to become one."""
    found = []
    for child in psutil.process_iter(["ppid", "cmdline"]):
        if child.info["ppid"] == process.pid and "jobs.guarded_child" in (child.info["cmdline"] or ()):
            found.append(child)
    return found


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
    num_wrong = 0
    margin = -(-predictor.config.halo_px // 64) * 64
    boxes = chosen_boxes(*image.shape[:2], window_px)
    for box in boxes:
        y0, x0 = ((max(0, start - margin)) // 64 * 64 for start in (box.y0, box.x0))
        (alone_HW,) = predictor([np.array(image[y0 : box.y1 + margin, x0 : box.x1 + margin])])
        seen_HW = alone_HW[box.y0 - y0 : box.y1 - y0, box.x0 - x0 : box.x1 - x0]
        num_wrong += int(((mask_HW[box.slices] > 0) != (seen_HW > 0)).sum())
    return {"num_boxes": len(boxes), "num_pixels": len(boxes) * BOX_PX**2, "num_wrong": num_wrong}


def needed_bytes(path: Path, window_px: int, predictor: Predictor) -> int:
    """Bytes of the tiles that the windows and their margins touch, each once a window."""
    page = tifffile.TiffFile(path).pages[0]
    num_columns = -(-page.imagewidth // page.tilewidth)
    boxes = windows.grid(page.imagelength, page.imagewidth, window_px)
    total = 0
    for box in boxes:
        row = ManifestRow(
            *(0, 0, "", "", 0, "", -1),
            *(box.y0, box.x0, box.height, box.width, len(boxes), window_px),
            *(*page.shape[:2], 0, None),
        )
        part = windows.reading(row, predictor.config)
        outer = box if part is None else part.outer
        rows = range(outer.y0 // page.tilelength, -(-outer.y1 // page.tilelength))
        columns = range(outer.x0 // page.tilewidth, -(-outer.x1 // page.tilewidth))
        total += sum(page.databytecounts[y * num_columns + x] for y in rows for x in columns)
    return total


def one_image(arguments: argparse.Namespace, folder: Path, proxy: FaultProxy, path: Path, level: int) -> dict[str, Any]:
    """Predict, assemble and compare one image at one level."""
    predictor = Predictor.from_pretrained(arguments.model, level=level)
    source = f"s3://archive/{path.stem}"
    masks: list[np.ndarray] = []
    runs = []
    for window_px in (arguments.window_px, arguments.other_px):
        output = folder / f"{path.stem}-L{level}-{window_px}"
        before, num_before = proxy.bytes_of("GET", path.name), len(proxy.bodies)
        words = ["--model", arguments.model, "--level", str(level), "--input", source, "--output", str(output)]
        words += ["--window-px", str(window_px), "--backend", "inline", "--threads", "1", "--write", "parquet"]
        run = measured(["predict", *words])
        run["bytes_read"] = proxy.bytes_of("GET", path.name) - before
        run["num_requests"] = len(proxy.bodies) - num_before
        run["bytes_needed"] = needed_bytes(path, window_px, predictor)
        mask = folder / f"{path.stem}-L{level}-{window_px}.mask.tif"
        run["assemble"] = measured(["assemble", str(output), path.name, "--out", str(mask)])
        masks.append(tifffile.imread(mask))
        num_windows = len(windows.grid(*masks[0].shape, window_px))
        run |= {"window_px": window_px, "num_windows": num_windows}
        run["bytes_for_headers_at_most"] = (num_windows + 2) * 4 * BLOCK_BYTES
        runs.append(run)
    image = tifffile.imread(path)
    return {
        "level": level,
        "runs": runs,
        "boxes": wrong_pixels(image, masks[0], predictor, arguments.window_px),
        "again": {"num_pixels": masks[0].size, "num_wrong": int((masks[0] != masks[1]).sum())},
        "foreground": round(float((masks[0] > 0).mean()), 4),
    }


def whole(arguments: argparse.Namespace, folder: Path, path: Path, level: int) -> dict[str, Any]:
    """A corner as an image of its own: windows against one forward of all of it."""
    side = arguments.whole_px
    source, output, mask = folder / "corner", folder / f"corner-L{level}", folder / f"corner-L{level}.tif"
    source.mkdir(exist_ok=True)
    image = tifffile.imread(path)[:side, :side]
    tifffile.imwrite(source / "corner.tif", image, tile=(256, 256), compression="deflate", bigtiff=True)
    words = ["--model", arguments.model, "--level", str(level), "--input", str(source), "--output", str(output)]
    words += ["--window-px", str(side // 4), "--backend", "inline", "--threads", "1", "--write", "parquet"]
    measured(["predict", *words])
    measured(["assemble", str(output), "corner.tif", "--out", str(mask)])
    (whole_HW,) = Predictor.from_pretrained(arguments.model, level=level, tile_px=side)([image])
    return {
        "level": level,
        "side": side,
        "num_wrong": int(((tifffile.imread(mask) > 0) != (whole_HW > 0)).sum()),
    }


def main() -> None:
    """Make the images, run everything, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--maker", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--levels", default=None, help="such as 1,2,3,4; default: the model's deepest")
    parser.add_argument("--grey-px", type=int, default=6144)
    parser.add_argument("--colour-px", type=int, default=16384)
    parser.add_argument("--window-px", type=int, default=2048)
    parser.add_argument("--other-px", type=int, default=4096)
    parser.add_argument("--whole-px", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where the images are kept between calls; default: nowhere")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepest = Predictor.from_pretrained(arguments.model).level
    levels = [deepest] if arguments.levels is None else [int(level) for level in arguments.levels.split(",")]
    result: dict[str, Any] = {"setting": setting(), "model": arguments.model, "images": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kept = arguments.folder or folder
        kept.mkdir(exist_ok=True, parents=True)
        (folder / "store").mkdir()
        with SeaweedFS(folder / "store") as server:
            os.environ.update(server.environment, AWS_EC2_METADATA_DISABLED="true")
            proxy = FaultProxy(server.environment["AWS_ENDPOINT_URL"])
            wanted = ((arguments.grey_px, ("--kind", "fluo", "--u16")), (arguments.colour_px, ()))
            for side, options in wanted:
                path = mosaic(arguments, kept, side, "--split", "test", *options)
                os.environ["AWS_ENDPOINT_URL"] = server.environment["AWS_ENDPOINT_URL"]
                storage.upload_file(path, f"s3://archive/{path.stem}/{path.name}")
                os.environ["AWS_ENDPOINT_URL"] = proxy.url
                shown = {"size_bytes": path.stat().st_size, "options": options}
                shown["levels"] = [one_image(arguments, folder, proxy, path, level) for level in levels]
                result["images"][str(side)] = shown
            result["whole"] = [whole(arguments, folder, path, level) for level in levels]
            proxy.close()
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
