"""Work behind a guard: the same pixels as without, and whatever happens to the child is told as the image's error."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from jobs import guarded
from jobs.guarded import DecodePool, GuardedPredictor, Limits
from jobs.ranged import Ranged
from tests.faults import hostile_decoder as hostile
from unetpp.errors import ImageError, UnetppError
from unetpp.images import decode_image
from unetpp.predictor import Predictor
from unetpp.spans import Span

LIMITS = Limits(seconds=1.0, memory_bytes=256 << 20)


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[DecodePool]:
    """One decoder with bugs, behind short limits."""
    monkeypatch.setattr(guarded, "DECODER", "tests.faults.hostile_decoder:decode")
    with DecodePool(1, max_pixels=10**6, limits=LIMITS) as pool:
        yield pool


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "jobs.guarded_child" in child.cmdline()]


def test_images_come_out_as_without_the_guard(archive: Path) -> None:
    with DecodePool(1, max_pixels=10**6, limits=LIMITS) as pool:
        for path in sorted(archive.rglob("*")):
            if path.suffix.lower() in (".png", ".jpg", ".tif"):
                content = path.read_bytes()
                wanted, seen = decode_image(content), pool.decode(content).image_HWC
                assert seen.dtype == wanted.dtype
                np.testing.assert_array_equal(seen, wanted)
                assert seen.flags.writeable
        assert len(_children()) == 1


@pytest.mark.parametrize(
    ("content", "code", "detail"),
    [
        (hostile.SEGFAULT, "crash", "SIGSEGV"),
        (hostile.LOOP, "timeout", "longer than 1 s of work"),
        (hostile.SLEEP, "timeout", "longer than 5 s"),
        (hostile.EAT, "too_large", "more than 256 MiB|memory"),
        (hostile.LIE, "crash", "nonsense"),
        (hostile.BABBLE, "crash", "nonsense"),
        (b"", "decode", "empty"),
    ],
)
def test_what_a_decoder_does_to_its_process_is_the_images_error(
    decoders: DecodePool, archive: Path, content: bytes, code: str, detail: str
) -> None:
    started = time.monotonic()
    with pytest.raises(ImageError, match=detail) as caught:
        decoders.decode(content)
    assert caught.value.code == code
    assert time.monotonic() - started < 30
    good = (archive / "a.png").read_bytes()
    np.testing.assert_array_equal(decoders.decode(good).image_HWC, decode_image(good))  # and the next image is decoded


def test_pixels_are_counted_before_they_are_decoded(archive: Path) -> None:
    with DecodePool(1, max_pixels=100, limits=LIMITS) as pool, pytest.raises(ImageError, match="too_large"):
        pool.decode((archive / "a.png").read_bytes())


def test_the_child_knows_no_secret(decoders: DecodePool, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    decoders.decode((archive / "a.png").read_bytes())
    (child,) = _children()
    known = {"PATH", "PYTHONPATH", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "LD_LIBRARY_PATH"}
    assert set(child.environ()) - {"LC_CTYPE"} <= known


def test_a_child_finds_the_libraries_that_its_parent_finds(
    decoders: DecodePool, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    decoders.decode((archive / "a.png").read_bytes())
    (child,) = _children()
    assert child.environ()["LD_LIBRARY_PATH"] == str(tmp_path)


def test_a_child_that_cannot_start_is_no_images_error(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "DECODER", "no_such_codec:decode")
    with DecodePool(1, max_pixels=10**6, limits=LIMITS) as pool:
        for _ in range(2):
            with pytest.raises(UnetppError, match=r"cannot start: .*exit status 1.*'no_such_codec'") as caught:
                pool.decode((archive / "a.png").read_bytes())
            assert not isinstance(caught.value, ImageError)
    with GuardedPredictor(tmp_path / "absent", 2, "fast", 64) as predictor:
        with pytest.raises(UnetppError, match=r"cannot start: .*absent") as caught:
            predictor.predict([np.zeros((8, 8, 3), np.uint8)])
        assert not isinstance(caught.value, ImageError)


def test_a_child_that_was_killed_between_two_images_is_replaced(decoders: DecodePool, archive: Path) -> None:
    good = (archive / "a.png").read_bytes()
    decoders.decode(good)
    for child in _children():
        child.kill()
        child.wait()
    np.testing.assert_array_equal(decoders.decode(good).image_HWC, decode_image(good))


def test_children_end_with_the_pool_and_with_the_parent(archive: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from jobs.guarded import DecodePool, Limits\n"
        "pool = DecodePool(1, max_pixels=10**6, limits=Limits(1.0))\n"
        f"pool.decode(open({str(archive / 'a.png')!r}, 'rb').read())\n"
        "print(pool._idle.get()._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with psutil.Popen([sys.executable, "-c", code], stdout=-1, env={**os.environ, "PYTHONPATH": "."}) as parent:
        child = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(child)
    with DecodePool(2, max_pixels=10**6, limits=LIMITS) as pool:
        pool.decode((archive / "a.png").read_bytes())
        assert _children()
    assert not _children()


def test_a_slow_store_is_not_taken_for_an_image_that_hangs(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "WALL_FACTOR", 100)  # it may start slowly
    content = (archive / "a.png").read_bytes()

    def read(spans: Sequence[Span]) -> list[bytes]:
        time.sleep(4)
        return [content[start:stop] for start, stop in spans]

    with DecodePool(1, max_pixels=10**6, limits=Limits(seconds=0.3)) as pool:
        measure = pool.measure(Ranged("a.png", len(content), read))
    assert (measure.height, measure.width) == decode_image(content).shape[:2]


def test_many_threads_share_few_children(archive: Path) -> None:
    good = (archive / "a.png").read_bytes()
    with DecodePool(2, max_pixels=10**6, limits=LIMITS) as pool, ThreadPoolExecutor(8) as threads:
        images = list(threads.map(pool.decode, [good] * 64))
        assert len(_children()) <= 2
    assert all(np.array_equal(image.image_HWC, decode_image(good)) for image in images)


def test_a_guarded_prediction_is_the_prediction(tiny_model: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (50, 40, 3), np.uint8), rng.integers(0, 65536, (20, 90, 1), np.uint16)]
    for mode, flips in (("fast", False), ("accurate", True)):
        wanted = Predictor.from_pretrained(tiny_model, mode, tile_px=64, flips=flips).predict(images)  # type: ignore[arg-type]
        with GuardedPredictor(tiny_model, 2, mode, 64, flips=flips) as predictor:  # type: ignore[arg-type]
            seen = predictor.predict(images)
        for one, other in zip(seen, wanted, strict=True):
            np.testing.assert_array_equal(one.mask_HW, other.mask_HW)
            assert one.uncertainty == pytest.approx(other.uncertainty, abs=1e-6)


def test_a_large_image_may_take_longer_and_is_seen_to_be_worked_on(tiny_model: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    with (
        GuardedPredictor(tiny_model, 2, "accurate", 64, 0.1, flips=True) as predictor,
        pytest.raises(ImageError, match="timeout: it took longer than"),
    ):
        predictor.predict([image])
    signs: list[float] = []
    with GuardedPredictor(
        tiny_model,
        2,
        "accurate",
        64,
        0.1,
        seconds_per_pixel=300 / image.size,
        waiting=lambda: signs.append(time.monotonic()),
        flips=True,
    ) as predictor:
        (seen,) = predictor.predict([image])
    assert seen.mask_HW.shape == image.shape[:2]
    assert signs
