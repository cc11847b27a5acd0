"""pipeline.data.shard_format: the bytes of a shard are those of numpy and tar, a seal finds every change."""

import io
import tarfile

import numpy as np
import pytest

from pipeline.data import shard_format


def test_headers_are_those_of_numpy_and_tar():
    array = np.arange(5, dtype="<u2")
    member = shard_format.npy_header(array.dtype, 5) + array.tobytes()
    assert np.array_equal(np.load(io.BytesIO(member)), array)
    tar = (
        shard_format.tar_header("00000000-0000.tokens.npy", len(member))
        + member.ljust(512, b"\0")
        + bytes(1024)
    )
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        (info,) = archive.getmembers()
    assert (info.name, info.size, info.mtime, info.uid, info.gid) == (
        "00000000-0000.tokens.npy",
        138,
        0,
        0,
        0,
    )


def test_dtype_holds_every_id():
    assert shard_format.token_dtype(65_536) == np.dtype("<u2")
    assert shard_format.token_dtype(65_537) == np.dtype("<u4")


def test_a_seal_finds_every_flipped_byte():
    sealed = shard_format.seal(f'{{"checksum": "{shard_format.UNSEALED}", "tokens": 5}}'.encode())
    assert shard_format.is_sealed(sealed)
    for place in range(len(sealed)):
        flipped = bytearray(sealed)
        flipped[place] ^= 1
        assert not shard_format.is_sealed(bytes(flipped)), place


@pytest.mark.parametrize("folder", [0, 7, 99_999, 100_000])
def test_the_names_of_a_folder_are_those_of_its_shards(folder: int) -> None:
    """Also where the numbers outgrow their zeros."""
    first = folder * shard_format.SHARDS_PER_FOLDER
    names = [shard_format.shard_path(first + i) for i in range(shard_format.SHARDS_PER_FOLDER)]
    assert shard_format.shard_paths(folder) == names
