"""OpenVINO alone: tiling is invisible, a GPU is refused, and no torch is loaded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unetpp.test_engines import network
from unetpp.checkpoint import save_pretrained
from unetpp.errors import ConfigError
from unetpp.predictor import Predictor


@pytest.mark.parametrize("level", [2, 4])
def test_tiling_is_invisible(level: int, tmp_path: Path) -> None:
    save_pretrained(network(level=level), tmp_path)
    image_HWC = np.random.default_rng(3).integers(0, 256, (301, 417, 3), np.uint8)
    tiled, whole = (
        Predictor.from_pretrained(tmp_path, engine="openvino", threads=1, tile_px=tile_px)([image_HWC])[0]
        for tile_px in (128, 512)
    )
    assert (tiled != whole).mean() <= (0 if level <= 2 else 1e-4)


def test_openvino_is_refused_on_a_gpu(tmp_path: Path) -> None:
    save_pretrained(network(level=1), tmp_path)
    with pytest.raises(ConfigError, match="openvino computes on CPU"):
        Predictor.from_pretrained(tmp_path, engine="openvino", device="cuda")


def test_predict_in_one_process_of_a_local_folder_loads_neither_torch_nor_ray_nor_s3(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(images / "a.png")
    words = ["predict", "--model", "nuclei", "--input", images, "--output", tmp_path / "out", "--backend", "inline"]
    code = (
        "import sys\nfrom jobs.cli import run_command_line\n"
        f"assert run_command_line(words={[str(word) for word in words]!r}) == 0\n"
        "assert 'openvino' in sys.modules\n"
        "assert {'torch', 'ray', 'prefect', 'botocore'}.isdisjoint(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").rglob("part-*.parquet"))
