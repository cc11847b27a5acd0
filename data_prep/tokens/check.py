"""Every fault of a dataset, in a sentence: what data_prep.verify prints.

    small files, sizes of the tars -> each tar, in several processes -> members -> tokens

Nothing is taken from the code that writes datasets: the format alone says what must be there.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32
from tqdm import tqdm

from pipeline.data import shard_format as fmt
from pipeline.data.dataset_files import read_bytes
from pipeline.data.manifest import Manifest
from pipeline.data.pictures import picture_rows
from pipeline.errors import DataError
from pipeline.files import parse_json, regular_file, sha256_of
from pipeline.remote import connect, read_range


def find_faults(folder: str, *, quick: bool = False, workers: int | None = None) -> Iterator[str]:
    """A sentence for each fault of one dataset; with quick, the shards are not read."""
    try:
        manifest = Manifest.load(folder)
        index = manifest.index
    except DataError as error:
        yield str(error)
        return
    yield from _check_small_files(manifest)
    if "://" not in folder:
        yield from _check_files(manifest)
    if quick:
        return
    is_text = manifest.row_tokens is None
    if is_text and manifest.num_shards and not _ends_with_eod(manifest, manifest.num_shards - 1):
        yield f"{folder}: the last document does not end with EOD."
    del index
    num_workers = min(workers or os.cpu_count() or 1, max(manifest.num_shards, 1))
    shards = range(manifest.num_shards)
    with _progress(manifest) as bar:
        for shard, faults in zip(
            shards, _map(partial(_check_shard_of, folder), shards, num_workers)
        ):
            bar.update(int(manifest.shard_bytes[shard]))
            yield from faults


def _check_small_files(manifest: Manifest) -> Iterator[str]:
    """manifest.json, index.npy, tokenizer.json and provenance.jsonl have their checksums."""
    folder, facts = manifest.folder, manifest.tokenizer
    raw = read_bytes(f"{folder}/manifest.json")
    checksums = {
        "index.npy": manifest.index_sha256,
        "tokenizer.json": facts.sha256,
        "provenance.jsonl": parse_json(raw).get("provenance_sha256"),
    }
    for name, expected in checksums.items():
        try:
            actual = sha256_of(read_bytes(f"{folder}/{name}"))
        except DataError as error:
            yield str(error)
            continue
        if actual != expected:
            yield f"{folder}/{name} has sha256 {actual}, the manifest says {expected}."


def _check_files(manifest: Manifest) -> Iterator[str]:
    """Each tar of a local dataset has its size, and no other file lies under shards/."""
    listed = set(manifest.paths)
    for path, size in zip(manifest.paths, manifest.shard_bytes.tolist()):
        file = Path(manifest.folder, path)
        if not file.is_file():
            yield f"{file} is missing."
        elif file.stat().st_size != size:
            yield f"{file} has {file.stat().st_size} bytes, the manifest says {size}."
    for file in sorted(Path(manifest.folder, "shards").rglob("*")):
        if not file.is_dir() and str(file.relative_to(manifest.folder)) not in listed:
            yield f"{file} is not part of the dataset."


@lru_cache(maxsize=1)
def _load(folder: str) -> Manifest:
    return Manifest.load(folder)


def _check_shard_of(folder: str, shard: int) -> list[str]:
    """In a worker: the manifest is read once a process."""
    return list(check_shard(_load(folder), shard))


def check_shard(manifest: Manifest, shard: int) -> Iterator[str]:
    """A sentence for each fault of one tar, named as closely as the headers allow."""
    path = f"{manifest.folder}/{manifest.paths[shard]}"
    try:
        data = _bytes_of(path, most=int(manifest.shard_bytes[shard]))
    except (DataError, OSError, ValueError) as error:
        yield f"{path} cannot be read: {error}"
        return
    faults = list(_check_members(manifest, shard, data))
    if sha256_of(data.data) != manifest.sha256[shard]:
        where = (
            ""
            if faults
            else " Headers, padding and arrays fit the index: the manifest's sha256 itself may be "
            "damaged."
        )
        faults.insert(0, f"sha256 is not the manifest's {manifest.sha256[shard][:12]}...{where}")
    for fault in faults:
        yield f"{path}: {fault}"


def _check_members(manifest: Manifest, shard: int, data: np.ndarray) -> Iterator[str]:
    """Each member lies where the index says, with the header, padding and checksum it must have.

    What is expected is built anew from the format, so that no byte of the tar goes unchecked.
    """
    rows = manifest.index[manifest.block_starts[shard] : manifest.block_starts[shard + 1]]
    begins_document = shard == 0 or _ends_with_eod(manifest, shard - 1)
    place = 0
    for block, row in enumerate(rows):
        last = block == len(rows) - 1
        arrays = []
        for kind, dtype, num, shape in manifest.layout.members:
            name = fmt.member_name(manifest.shard_keys[shard], block, kind)
            count, offset, crc = (int(row[f]) for f in (num, f"{kind}_offset", f"{kind}_crc32"))
            size = count * dtype.itemsize * math.prod(shape)
            if offset != place + fmt.TAR_BLOCK + fmt.NPY_HEADER_BYTES or offset + size > len(data):
                yield (
                    f"{name}: the index puts it at byte {offset}, which cannot be. The rest was "
                    "not looked at."
                )
                return
            header = fmt.tar_header(name, fmt.NPY_HEADER_BYTES + size)
            header += fmt.npy_header(dtype, count, shape)
            if data[place:offset].tobytes() != header:
                yield f"{name}: its tar or npy header is damaged."
            place = offset + size + -(fmt.NPY_HEADER_BYTES + size) % fmt.TAR_BLOCK
            if data[offset + size : place].any():
                yield f"{name}: the padding after it is damaged."
            if crc32(data[offset : offset + size]) != crc:
                yield f"{name}: crc32 is not the index's."
            arrays.append(data[offset : offset + size].view(dtype).reshape(-1, *shape))
        tokens, docs, loss, images = fmt.Block(*arrays)
        tokens_name = fmt.member_name(manifest.shard_keys[shard], block, "tokens")
        if not last and len(tokens) != manifest.block_tokens:
            yield (
                f"{tokens_name}: {len(tokens)} tokens; every block but the last has "
                f"{manifest.block_tokens}."
            )
        if loss is not None and manifest.row_tokens is not None:
            yield from _check_rows(manifest.row_tokens, tokens_name, docs, loss)
        if images is not None:
            yield from _check_images(manifest, tokens_name, fmt.Block(tokens, docs, loss, images))
        yield from _check_tokens(manifest, tokens_name, tokens, docs, begins_document)
        begins_document = bool(len(tokens)) and int(tokens[-1]) == manifest.tokenizer.eod
    if data[place:].any() or len(data) < place + 2 * fmt.TAR_BLOCK:
        yield "the end of the archive is damaged."
    totals = int(rows["num_tokens"].sum()), int(rows["num_docs"].sum())
    expected = int(manifest.shard_tokens[shard]), int(manifest.shard_documents[shard])
    if totals != expected:
        yield f"the index counts {totals} tokens and documents, the manifest {expected}."


def _check_tokens(
    manifest: Manifest, name: str, tokens: np.ndarray, docs: np.ndarray, begins_document: bool
) -> Iterator[str]:
    """Ids are below vocab_size; documents start exactly after each EOD."""
    facts = manifest.tokenizer
    if len(tokens) and int(tokens.max()) >= facts.vocab_size:
        yield f"{name}: id {int(tokens.max())} is not below vocab_size ({facts.vocab_size})."
    if manifest.row_tokens is not None:  # there EOD is padding, or whatever the template makes it
        return
    starts = np.flatnonzero(tokens[:-1] == facts.eod) + 1
    if begins_document:
        starts = np.concatenate([[0], starts])
    if not np.array_equal(starts, docs):
        yield (
            f"{name}: {len(docs)} documents are listed, {len(starts)} start after an EOD; their "
            "places must agree."
        )


def _check_rows(row_tokens: int, name: str, docs: np.ndarray, loss: np.ndarray) -> Iterator[str]:
    """A document starts with each row; the mask is 0 and 1, and 0 where a document starts."""
    if len(loss) % row_tokens:
        yield f"{name}: {len(loss)} tokens are not whole rows of {row_tokens}."
    places = docs.astype(np.int64)
    if (np.diff(places) <= 0).any() or not np.isin(np.arange(0, len(loss), row_tokens), docs).all():
        yield f"{name}: documents must start in ascending order, one of them with each row."
    elif (places >= len(loss)).any():
        yield f"{name}: a document starts behind the block's end."
    elif loss[places].any():
        yield f"{name}: the first token of a document is marked as learned."
    if len(loss) and int(loss.max()) > 1:
        yield f"{name}: the mask of the loss holds {int(loss.max())}; it is made of 0 and 1."


def _check_images(manifest: Manifest, name: str, block: fmt.Block) -> Iterator[str]:
    """A picture for each run of placeholders, which nobody learns; no row has more than it may."""
    pictures, row_tokens = manifest.pictures, manifest.row_tokens
    assert pictures is not None and row_tokens is not None
    assert block.loss is not None and block.images is not None
    is_image = block.tokens == pictures.image_token_id
    try:
        rows = picture_rows(block.tokens, pictures, row_tokens)
    except ValueError as error:
        yield f"{name}: {error}."
        return
    if len(rows) != len(block.images):
        yield f"{name}: placeholders of {len(rows)} pictures, and {len(block.images)} pictures."
    if (most := int(np.bincount(rows).max(initial=0))) > manifest.images_per_row_max:
        yield f"{name}: a row of {most} pictures, more than {manifest.images_per_row_max}."
    if block.loss[is_image].any():
        yield f"{name}: a placeholder is marked as learned."


def _ends_with_eod(manifest: Manifest, shard: int) -> bool:
    """Whether a shard's last document ends in it; yes for one that its own check will name."""
    if not manifest.shard_tokens[shard]:
        return True
    try:
        block = int(np.diff(manifest.block_starts[shard : shard + 2])[0]) - 1
        row = manifest.block_row(shard, block)
        begin = int(row["tokens_offset"]) + (int(row["num_tokens"]) - 1) * manifest.dtype.itemsize
        path, end = f"{manifest.folder}/{manifest.paths[shard]}", begin + manifest.dtype.itemsize
        last = (
            read_range(*connect(path), begin, end) if "://" in path else _bytes_of(path)[begin:end]
        )
    except Exception:  # every fsspec file system raises its own
        return True
    return len(last) < end - begin or int.from_bytes(last, "little") == manifest.tokenizer.eod


def _bytes_of(path: str, *, most: int | None = None) -> np.ndarray:
    """(n,) uint8: a local file mapped, another one read, as many bytes as it must have.

    Raises:
        DataError, OSError, ValueError: it cannot be read.
    """
    if "://" in path:
        return np.frombuffer(read_bytes(path, most=most or 0), np.uint8)
    return np.memmap(regular_file(path, inside=Path(path).parents[2]), np.uint8, "r")


def _map(function: Callable[[int], list[str]], shards: range, workers: int) -> Iterator[list[str]]:
    """Results in order, from this process or from several."""
    if workers == 1:
        yield from map(function, shards)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, shards)


def _progress(manifest: Manifest) -> tqdm:
    total = int(manifest.shard_bytes.sum())
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=Path(manifest.folder).name,
        disable=not sys.stderr.isatty(),
    )
