"""report.html: what a run did, to look at in the morning, offline and safe to open."""

import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from jobs import predict, rebuild
from jobs.contract import PredictConfig, RebuildConfig
from unetpp.checkpoint import LevelScore, Pretrained, from_pretrained, save_pretrained

HOSTILE = '<script>alert("x")<b>&.png'


@pytest.fixture
def report(tmp_path: Path, tiny_model: Path) -> Callable[..., str]:
    """Function: segment four good images and two bad ones, and return the report's HTML."""

    def run(more: Path | None = None, **changed: Any) -> str:
        images = tmp_path / "images"
        images.mkdir()
        if more is not None:
            shutil.copy(more, images)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 255, (40 + number, 60), np.uint8)
            Image.fromarray(pixels).save(images / f"good {number}.png")
        (images / "cut.png").write_bytes((images / "good 0.png").read_bytes()[:400])
        (images / HOSTILE).write_bytes(b"<html>")
        settings = {"model": str(tiny_model), "input": str(images), "output": str(tmp_path / "out"), "threads": 1}
        result = predict.run(PredictConfig.model_validate({**settings, "backend": "inline", **changed}))
        assert result.report_uri is not None
        return Path(result.report_uri).read_text()

    return run


def test_it_tells_counts_and_failures_by_cause(report) -> None:
    html = report()
    for number, what in ((6, "images listed"), (4, "predicted"), (2, "failed"), (0, "unchanged since earlier runs")):
        assert re.search(rf"<b>{number}</b><span>{what}", html)
    assert "6 listed = 4 predicted + 2 failed + 0 unchanged" in html
    assert re.search(r'<span class="count">2</span><b>decode</b>', html)
    assert "cut.png" in html


def test_it_shows_every_image_of_a_small_run_with_its_outline(report) -> None:
    html = report()
    for number in range(4):
        assert html.count(f'alt="image good {number}.png"') in (1, 2)  # drawn, and perhaps among the least certain
        assert 'alt="outline of its mask"' in html
    assert html.count('src="data:image/png;base64,') == 2 * html.count("<figure")


def test_it_opens_offline(report) -> None:
    html = report()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', html) == []
    assert not re.search(r"https?://|@import|url\(", html)


def test_names_of_images_are_text_not_markup(report) -> None:
    html = report()
    assert "<script" not in html
    assert "&lt;script&gt;alert(" in html


def test_the_plot_has_every_level_that_the_model_was_chosen_from(report, tiny_model: Path, tmp_path: Path) -> None:
    model = from_pretrained(tiny_model)
    scores = {
        name: LevelScore(
            split="val",
            num_images=9,
            mean_iou=iou,
            mean_iou_interval=(iou - 0.02, iou + 0.01),
            num_parameters=number,
            gmacs_per_megapixel=number,
            seconds_per_megapixel=number,
        )
        for number, (name, iou) in enumerate({"L1": 0.7, "L2": 0.8}.items(), start=1)
    }
    scored = Path(shutil.copytree(tiny_model, tmp_path / "scored"))
    save_pretrained(model, scored, Pretrained(model=model.config, scores=scores))
    html = report(model=str(scored))
    assert re.search(r">L1</text>", html)
    assert re.search(r">L2 \(used\)</text>", html)
    assert "0.7000" in html
    assert "0.7800 to 0.8100" in html


def test_a_window_is_shown_and_named_by_its_place(report, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "big.tif", np.random.default_rng(0).integers(0, 255, (120, 200), np.uint8))
    html = report(window_px=96, more=tmp_path / "big.tif")
    assert html.count('alt="image big.tif"') in range(4, 9)
    assert "window of 24 x 8 at y 96, x 192 of 120 x 200" in html


def test_failures_without_end_take_no_memory(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "absent.csv").write_text("uri\n" + "".join(f"{number}.png\n" for number in range(20_000)))
    settings = {"model": str(tiny_model), "input": f"{tmp_path}/absent.csv", "output": f"{tmp_path}/out", "threads": 1}
    predict.run(PredictConfig.model_validate({**settings, "backend": "inline", "max_failed_share": 1.0}))
    tracemalloc.start()
    result = rebuild.run(RebuildConfig(run=f"{tmp_path}/out/runs/r00001"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert result.report_uri is not None
    html = Path(result.report_uri).read_text()
    assert re.search(r'<span class="count">20000</span><b>gone</b>', html)
    assert ("199.png" in html, "200.png" in html) == (True, False)
