"""Which bytes of an archive in a store are read, for its index and for some of its members."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import archives, sources, storage
from jobs.contract import PredictConfig
from jobs.manifest import Listed, ManifestRow
from jobs.sources import Listing, columns_of, limits_of
from tests.faults.proxy import FaultProxy

MEMBER_BYTES, NUM_MEMBERS, ROWS_PER_GROUP = 100_000, 40, 10
WANTED = [3, 4, 17]
"""Two neighbours and one further on: of two requests, and of two row groups."""
FOOTER_BYTES = 64 << 10
HEADERS_BYTES = 1_000
"""Of three members, in an archive or a Parquet file."""


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """Members by name, of bytes that cannot be packed."""
    rng = np.random.default_rng(0)
    return {f"{number:02d}.png": rng.bytes(MEMBER_BYTES) for number in range(NUM_MEMBERS)}


@pytest.fixture
def look(s3_prefix: str, counting_proxy: FaultProxy) -> Callable[[str], tuple[list[Listed], int]]:
    """Function: list the archive of that name, and say how many bytes of it were read."""

    def list_it(name: str) -> tuple[list[Listed], int]:
        counting_proxy.bodies.clear()
        found = sources.resolve((f"{s3_prefix}/in",), f"{s3_prefix}/out")
        listed = list(Listing(found, _config(s3_prefix), f"{s3_prefix}/out/indexes"))
        return listed, counting_proxy.bytes_of("GET", rf"/{name}$")

    return list_it


@pytest.fixture
def read(s3_prefix: str, counting_proxy: FaultProxy, contents) -> Callable[[str, list[Listed]], int]:
    """Function: read the wanted members of those listed, and say how many bytes of the archive were read."""

    def read_them(name: str, listed: list[Listed]) -> int:
        counting_proxy.bodies.clear()
        config, zeros = _config(s3_prefix), dict.fromkeys(ManifestRow._fields, 0)
        rows = [ManifestRow(**{**zeros, **listed[number]._asdict()}) for number in WANTED]
        with ThreadPoolExecutor(4) as threads:
            found = archives.contents([f"{s3_prefix}/in"], rows, threads, limits_of(config), columns_of(config))
            assert [content for _, content in found] == [list(contents.values())[number] for number in WANTED]
        return counting_proxy.bytes_of("GET", rf"/{name}$")

    return read_them


def _config(prefix: str) -> PredictConfig:
    return PredictConfig.model_validate({"model": "m", "input": f"{prefix}/in", "output": f"{prefix}/out"})


def _tar_of(contents: dict[str, bytes], mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as file:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def test_of_a_zip_the_directory_and_the_wanted_members_are_read(s3_prefix: str, contents, look, read) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)
    storage.write_bytes(f"{s3_prefix}/in/a.zip", packed.getvalue())
    listed, num_bytes = look("a.zip")
    directory_bytes = FOOTER_BYTES + 100 * NUM_MEMBERS
    assert num_bytes < directory_bytes
    assert read("a.zip", listed) < directory_bytes + len(WANTED) * MEMBER_BYTES + HEADERS_BYTES


def test_a_tar_is_streamed_once_and_then_the_wanted_members_are_read(s3_prefix: str, contents, look, read) -> None:
    storage.write_bytes(f"{s3_prefix}/in/a.tar", packed := _tar_of(contents, "w"))
    listed, num_bytes = look("a.tar")
    assert num_bytes == len(packed)
    assert look("a.tar") == (listed, 0)
    assert read("a.tar", listed) < len(WANTED) * MEMBER_BYTES + 2 * HEADERS_BYTES


def test_a_packed_tar_is_streamed_once_for_its_index_and_once_for_its_members(
    s3_prefix: str, contents, look, read
) -> None:
    storage.write_bytes(f"{s3_prefix}/in/a.tar.gz", packed := _tar_of(contents, "w:gz"))
    listed, num_bytes = look("a.tar.gz")
    assert num_bytes == len(packed)
    assert look("a.tar.gz") == (listed, 0)
    assert read("a.tar.gz", listed) <= len(packed)


def test_of_a_parquet_file_the_wanted_row_groups_of_the_image_column_are_read(
    s3_prefix: str, contents, look, read
) -> None:
    others = [b"x" * (4 * MEMBER_BYTES)] * NUM_MEMBERS
    table = pa.table({"key": list(contents), "image": list(contents.values()), "other": others})
    packed = io.BytesIO()
    pq.write_table(table, packed, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=False)
    storage.write_bytes(f"{s3_prefix}/in/a.parquet", packed.getvalue())
    listed, num_bytes = look("a.parquet")
    group_bytes = ROWS_PER_GROUP * MEMBER_BYTES + HEADERS_BYTES
    assert num_bytes < FOOTER_BYTES + NUM_MEMBERS // ROWS_PER_GROUP * group_bytes
    assert look("a.parquet") == (listed, 0)
    assert read("a.parquet", listed) < FOOTER_BYTES + 2 * group_bytes
