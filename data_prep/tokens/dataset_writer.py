"""Parts become the shards of datasets, once all units of a job are done.

Parts are renamed, in the order of the units; neighbours that are small (validation splits, small
inputs) are joined. manifest.json comes last. Everything here may be killed and run again: what has
been renamed is recognised by the plan, which follows from the markers alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.jobs import (
    JOB_FILE,
    WORK_FOLDER,
    close_job,
    disk_errors,
    locked,
    marked,
    read_markers,
    read_own,
)
from data_prep.sources.rejects import WANTED
from data_prep.tokens import pii_tally
from data_prep.tokens.held_out import ensure_held_out
from data_prep.tokens.shard_writer import PART, PICTURES, Part, copy_parts, layout_of
from data_prep.tokens.split import SPLITS, documents_in
from pipeline.data import pii_report
from pipeline.data import shard_format as fmt
from pipeline.data.dataset_files import read_bytes
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import DataError
from pipeline.files import sha256_of, sync_folder, whole_file, write_durably
from pipeline.log import logger
from pipeline.shapes import COUNT

SUMMARY_FILE = "summary.json"
# Of job.json and of markers: what is read of them.
JOB = {
    "units": range(2**31),
    "validation_fraction": float,
    "tokenizer": {"sha256": str, "vocab_size": range(1, 2**31), "eod": range(2**31)},
    "row_tokens?": (range(1, 2**31), None),
    "pii_max_rate?": float,
    "image_size?": range(1, fmt.MOST_IMAGE_SIZE + 1),
    "patch_size?": range(1, fmt.MOST_IMAGE_SIZE + 1),
    "image_token_id?": range(2**31),
}
LOWEST = {"digest": range(2**64), "documents": [COUNT], "ids": [str], "text_bytes": COUNT}
SPLIT = {"parts": [PART], "text_bytes": COUNT}
RESULT = {
    "rejects": {str: COUNT},
    "nearest?": (None, LOWEST),
    "held?": (None, LOWEST),
    "planted?": COUNT,
    "pii?": {str: pii_report.OF_SOURCE},
}
PACKING = ("row_tokens", "chat_template", "end_of_turn")  # what a job of packed rows adds


def finalize(output: Path, *, max_rejected_fraction: float) -> None:
    """Make OUT/<split>/ of all units' parts, OUT/rejects.jsonl and OUT/summary.json."""
    if not (output / JOB_FILE).is_file():
        raise DataError(f"{output} holds no job of data_prep: it has no {JOB_FILE}.")
    with disk_errors(output), locked(output):
        if is_complete(output):  # another task was faster
            close_job(output)
            return
        facts = read_own(output / JOB_FILE, JOB)
        names = SPLITS[: 2 if facts["validation_fraction"] else 1]
        each = {"splits": dict.fromkeys(names, SPLIT), "dialogues?": dict.fromkeys(names, COUNT)}
        missing = sorted(set(range(facts["units"])) - marked(markers(output)))
        if missing:
            raise DataError(
                f"{output}: {len(missing)} of {facts['units']} units are not done, first "
                f"{missing[:5]}. Run the same command, or the array tasks, again; only what is "
                "missing is done."
            )
        results = read_markers(markers(output), facts["units"], RESULT | each)
        rejects = Counter[str]()
        for result in results:
            result["splits"] = {name: result["splits"][name] for name in names}
            rejects.update(result["rejects"])
        _check_documents(output, results, rejects, max_rejected_fraction)
        if "pii_max_rate" in facts:
            pii_tally.report(output, results, facts["pii_max_rate"])
        results, note = ensure_held_out(output, results, facts, parts_folder(output))
        splits = {name: _gather(results, name) for name in names}
        _join_rejects(output, facts["units"])
        totals = {
            name: _make_dataset(output, name, facts, parts, text_bytes)
            for name, (parts, text_bytes) in splits.items()
        }
        summary: dict[str, Any] = totals | {"rejects": dict(sorted(rejects.items()))}
        if note:
            summary["held_out"] = note
        content = (json.dumps(summary, indent=1) + "\n").encode()
        write_durably(output / SUMMARY_FILE, content, scratch=output / WORK_FOLDER)
        close_job(output)
    for name, row in totals.items():
        logger.info(
            f"{output / name}: {row['documents']:,} documents, {row['tokens']:,} tokens, "
            f"{row['text_bytes']:,} bytes of text in {row['shards']} shards"
        )
    if rejects:
        logger.warning(
            f"{rejects.total()} documents were rejected: {dict(rejects)}; see "
            f"{output / 'rejects.jsonl'}"
        )


def _check_documents(
    output: Path, results: list[dict[str, Any]], rejects: Counter[str], fraction: float
) -> None:
    """Refuse a job without documents, or with too many that were rejected."""
    documents = sum(documents_in(result, split) for result in results for split in result["splits"])
    check_rejected(documents, rejects, fraction)
    if not documents:
        raise DataError(
            f"{output}: the input has no documents ({dict(rejects) or 'every file is empty'})."
        )


def is_complete(output: Path) -> bool:
    """The job has been finished; summary.json is its last file."""
    return (output / SUMMARY_FILE).is_file()


def check_rejected(documents: int, rejects: Counter[str], fraction: float) -> None:
    """Hold the ceiling on rejected documents.

    Raises:
        DataError: more than `fraction` of the documents were rejected.
    """
    bad = rejects.total() - sum(rejects[reason] for reason in WANTED)
    if not bad <= fraction * (documents + bad):  # NaN is no ceiling
        raise DataError(
            f"{bad} of {documents + bad} documents were rejected ({dict(rejects)}), more than "
            f"max_rejected_fraction={fraction}. The first ones are in .work/rejects; mend the "
            "input, or run again with a higher ceiling."
        )


def parts_folder(output: Path) -> Path:
    """Where units put their parts."""
    return output / WORK_FOLDER / "parts"


def markers(output: Path) -> Path:
    """Where the units' markers are."""
    return output / WORK_FOLDER / "tokenize"


def rejects_path(output: Path, unit: int) -> Path:
    """Rejected documents of a unit."""
    return output / WORK_FOLDER / "rejects" / f"{unit:08d}.jsonl"


def copy_tokenizer(output: Path, tokenizer: Tokenizer) -> None:
    """Keep the tokenizer for the datasets; they are made after it may be gone."""
    write_durably(output / WORK_FOLDER / "tokenizer.json", tokenizer.raw)


def _gather(results: list[dict[str, Any]], name: str) -> tuple[list[Part], int]:
    rows = [result["splits"][name] for result in results]
    return [Part.of(part) for row in rows for part in row["parts"]], sum(
        row["text_bytes"] for row in rows
    )


def _join_rejects(output: Path, num_units: int) -> None:
    paths = [path for unit in range(num_units) if (path := rejects_path(output, unit)).is_file()]
    if paths:
        with whole_file(output / "rejects.jsonl", scratch=output / WORK_FOLDER) as target:
            for path in paths:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, target)


def _make_dataset(
    output: Path, name: str, facts: dict[str, Any], parts: list[Part], text_bytes: int
) -> dict[str, int]:
    """Move parts to their places as shards, and write what describes them; the totals."""
    folder, layout = output / name, layout_of(facts)
    shards: list[Part] = []
    for number, group in enumerate(_groups(parts, layout.join_tokens)):
        target = folder / fmt.shard_path(number)
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = [parts_folder(output) / part.name for part in group]
        if len(group) > 1:
            shards.append(
                copy_parts(sources, group, target, layout=layout, scratch=parts_folder(output))
            )
        else:
            shards.append(group[0])
            if sources[0].exists():  # else it was renamed before this was interrupted
                os.replace(sources[0], target)
    # Before the manifest, which says that they are there: a rename is on the disk with its folder.
    for shards_folder in sorted({(folder / fmt.shard_path(i)).parent for i in range(len(shards))}):
        sync_folder(shards_folder)
    scratch = output / WORK_FOLDER
    raw = read_bytes(str(scratch / "tokenizer.json"))
    write_dataset(folder, shards, facts=facts, raw=raw, text_bytes=text_bytes, scratch=scratch)
    return {
        "documents": sum(s.documents for s in shards),
        "tokens": sum(s.tokens for s in shards),
        "text_bytes": text_bytes,
        "shards": len(shards),
    }


def write_dataset(
    folder: Path,
    shards: list[Part],
    *,
    facts: dict[str, Any],
    raw: bytes,
    text_bytes: int,
    scratch: Path,
) -> None:
    """Write everything of a dataset but its shards, which are in place; the manifest last.

    Args:
        folder: the dataset.
        shards: in order; shard i is at shard_path(i).
        facts: of the job: `tokenizer` has the fields of TokenizerIdentity; packed rows have
            `row_tokens`, `chat_template` and `end_of_turn`; pictures also the names in PICTURES.
        raw: the tokenizer.json.
        text_bytes: UTF-8 bytes of all documents.
        scratch: see whole_file.
    """
    tokenizer, layout = facts["tokenizer"], layout_of(facts)
    buffer = io.BytesIO()
    try:
        rows = [tuple(row) for shard in shards for row in shard.blocks]
        index = np.array(rows, layout.index_dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{folder}: the markers tell of no blocks ({error}); start anew.") from None
    np.lib.format.write_array(buffer, index, version=(1, 0))
    write_durably(folder / "index.npy", buffer.getvalue(), scratch=scratch)
    write_durably(folder / "tokenizer.json", raw, scratch=scratch)
    lines = [
        {"path": fmt.shard_path(i), "documents": s.documents, "inputs": s.inputs}
        for i, s in enumerate(shards)
    ]
    provenance = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    write_durably(folder / "provenance.jsonl", provenance, scratch=scratch)
    head = {
        "format": fmt.FORMAT,
        "version": layout.version,
        "dtype": layout.dtype.str,
        "block_tokens": layout.block_tokens,
        **_packing(facts, layout, shards),
        "tokenizer": tokenizer,
        "tokens": sum(s.tokens for s in shards),
        "documents": sum(s.documents for s in shards),
        "text_bytes": text_bytes,
        "index_sha256": sha256_of(buffer.getvalue()),
        "provenance_sha256": sha256_of(provenance),
        "checksum": fmt.UNSEALED,
        "columns": fmt.SHARD_COLUMNS,
    }
    columns = [(s.tokens, s.bytes, s.documents, s.sha256, s.source, s.key) for s in shards]
    table = ",\n".join(json.dumps([fmt.shard_path(i), *row]) for i, row in enumerate(columns))
    text = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{table}\n ]\n}}\n'
    write_durably(folder / "manifest.json", fmt.seal(text.encode()), scratch=scratch)


def _packing(facts: dict[str, Any], layout: fmt.ShardLayout, shards: list[Part]) -> dict[str, Any]:
    """What the manifest says of packed rows, and of their pictures; of text nothing."""
    packing = {key: facts[key] for key in PACKING if layout.row_tokens is not None}
    if layout.pictures is None:
        return packing
    most = max((shard.images_per_row for shard in shards), default=0)
    return packing | {key: facts[key] for key in PICTURES} | {"images_per_row_max": most}


def _groups(parts: list[Part], join_tokens: int) -> Iterator[list[Part]]:
    """Parts of one shard each: alone, or small neighbours of one source up to join_tokens."""
    group: list[Part] = []
    for part in parts:
        fits = (
            group
            and group[0].source == part.source
            and sum(p.tokens for p in group) + part.tokens <= join_tokens
        )
        if group and not fits:
            yield group
            group = []
        group.append(part)
    if group:
        yield group
