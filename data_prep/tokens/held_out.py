"""A held-out set and something to train on, for a corpus so small that one of them has nothing.

    markers: each unit's train documents with the lowest digest; none? its held-out ones as such
    -> those with the lowest of all, copies along, as if validation_fraction were just right
    -> is nothing left to train on? -> the tail of the last document

At validation_fraction=0.005 three hundred documents leave nothing for validation once in five
corpora, and an only document leaves nothing to train on once in two hundred. The choice follows
from the markers alone; the parts of the units it touches are written anew under other names, and a
record says that they are whole, so that this may be killed anywhere.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.jobs import MOST_MARKER_BYTES, WORK_FOLDER, read_own
from data_prep.tokens.rows import RowPacker, documents_of
from data_prep.tokens.shard_writer import Part, layout_of, map_part
from data_prep.tokens.split import SPLITS, UnitWriter, documents_in
from pipeline.data import shard_format as fmt
from pipeline.data.dataset_files import read_bytes
from pipeline.data.tokenizer import Tokenizer
from pipeline.files import write_durably
from pipeline.log import logger

RECORD = "held_out.json"
TAIL_TOKENS = 1024  # of an only document, at least, but no more than a tenth of it


def ensure_held_out(
    output: Path, results: list[dict[str, Any]], facts: dict[str, Any], parts: Path
) -> tuple[list[dict[str, Any]], str]:
    """The units' results with a document in either split, if something is held out; and how.

    How: a sentence that says what was done for it; empty: nothing.

    Args:
        output: of the job.
        results: markers of all units; they have documents.
        facts: of job.json.
        parts: folder of the units' parts.
    """
    record = output / WORK_FOLDER / RECORD
    if not record.exists():
        if "validation" not in results[0]["splits"]:
            return results, ""
        if all(_documents(results, split) for split in SPLITS):
            return results, ""
    if not _documents(results, "train"):
        results = [_as_train(result) for result in results]
    if not record.exists():
        write_durably(record, json.dumps(_choose(results, facts, parts)).encode())
    shape = {"note": str, "splits": {str: {str: dict}}}
    content = read_own(record, shape, most=MOST_MARKER_BYTES)
    logger.warning(f"{output}: {content['note']}")
    new = content["splits"]
    changed = [r | {"splits": new.get(str(i), r["splits"])} for i, r in enumerate(results)]
    return changed, content["note"]


def _documents(results: list[dict[str, Any]], split: str) -> int:
    """Documents of a split; planted ones are none of the input's."""
    planted = sum(result.get("planted", 0) for result in results) if split == "train" else 0
    return sum(documents_in(result, split) for result in results) - planted


def _as_train(result: dict[str, Any]) -> dict[str, Any]:
    """A unit's result as if nothing had been held out; all of it was, but for what was planted.

    What was held out comes first: `held` counts its documents.
    """
    held, planted = result["splits"]["validation"], result["splits"]["train"]
    train = {
        "parts": held["parts"] + planted["parts"],
        "text_bytes": held["text_bytes"] + planted["text_bytes"],
    }
    splits = {"train": train, "validation": {"parts": [], "text_bytes": 0}}
    found = {"splits": splits, "nearest": result.get("held"), "all_held": True}
    if "dialogues" in result:
        found["dialogues"] = {"train": result["dialogues"]["validation"], "validation": 0}
    return result | found


def _choose(results: list[dict[str, Any]], facts: dict[str, Any], parts: Path) -> dict[str, Any]:
    """{splits: {unit: new `splits` of its marker}, note: what was done}."""
    fraction, total = facts["validation_fraction"], _documents(results, "train")
    fell = "all" if any(result.get("all_held") for result in results) else "none"
    why = f"{fell} of {total} documents fell into validation_fraction={fraction}; "
    noted = {i: result["nearest"] for i, result in enumerate(results) if result.get("nearest")}
    lowest = min(nearest["digest"] for nearest in noted.values())
    chosen = {i: nearest for i, nearest in noted.items() if nearest["digest"] == lowest}
    ids = [i for nearest in chosen.values() for i in nearest["ids"]]
    if len(ids) == total and "row_tokens" in facts:
        return {"splits": {}, "note": f"{why}a dialogue is not divided: prepare more of them"}
    if len(ids) == total:
        return _hold_out_tail(max(noted), results, facts, parts, why)
    splits = {}
    for number, nearest in chosen.items():
        if "row_tokens" in facts:
            splits[str(number)] = _divide_rows(number, results[number], facts, parts)
            continue
        rewriter = _Rewriter(number, results[number], facts, parts)
        is_validation = np.zeros(len(rewriter.ends), bool)
        is_validation[nearest["documents"]] = True
        splits[str(number)] = rewriter.divide(is_validation, nearest["text_bytes"], nearest["ids"])
    what = f"{ids[0]}" + f" and {len(ids) - 1} of the same digest" * (len(ids) > 1)
    return {"splits": splits, "note": f"{why}held out is the next by its digest: {what}"}


def _hold_out_tail(
    number: int, results: list[dict[str, Any]], facts: dict[str, Any], parts: Path, why: str
) -> dict[str, Any]:
    """The end of a unit's last document that was not planted becomes a document of its own."""
    rewriter = _Rewriter(number, results[number], facts, parts)
    eod, last = facts["tokenizer"]["eod"], results[number]["nearest"]["documents"][-1]
    begin, end = rewriter.starts[last], rewriter.ends[last] - 1  # without its end mark
    size = int(end - begin)
    if size < 2:
        return {"splits": {}, "note": f"{why}a document of {size} token cannot be divided"}
    share = int(size * facts["validation_fraction"])
    tail = max(share, min(size // 10, TAIL_TOKENS), 1)
    cut = end - tail
    rewriter.insert_end(cut, eod)
    is_validation = np.zeros(len(rewriter.ends), bool)
    is_validation[last + 1] = True
    tokenizer = Tokenizer(read_bytes(str(parts.parent / "tokenizer.json")), path="", eod=eod)
    text_bytes = int(tokenizer.token_byte_lengths()[rewriter.tokens[cut + 1 : end + 1]].sum())
    name = results[number]["nearest"]["ids"][-1]
    note = f"{why}held out are the last {tail} of {size} tokens of {name}"
    return {
        "splits": {str(number): rewriter.divide(is_validation, text_bytes, [name])},
        "note": note,
    }


class _Rewriter:
    """The train documents of a unit, read back from its parts."""

    def __init__(self, number: int, result: dict[str, Any], facts: dict[str, Any], parts: Path):
        self._number, self._parts_folder, self._eod = number, parts, facts["tokenizer"]["eod"]
        self._fraction = facts["validation_fraction"]
        self._old = result["splits"]["train"]
        self._parts = [Part.of(part) for part in self._old["parts"]]
        self._layout = fmt.ShardLayout(fmt.token_dtype(facts["tokenizer"]["vocab_size"]))
        self.tokens = np.concatenate(
            [
                block.tokens
                for part in self._parts
                for block in map_part(parts / part.name, part, self._layout)
            ]
        )
        self._find()

    def _find(self) -> None:
        """Where documents start and end; every train document of a unit ends in it."""
        self.ends = np.flatnonzero(self.tokens == self._eod) + 1
        self.starts = np.concatenate(([0], self.ends[:-1]))

    def insert_end(self, place: int, eod: int) -> None:
        """Divide the document at a place."""
        self.tokens = np.insert(self.tokens, place, eod)
        self._find()

    def divide(self, is_validation: np.ndarray, text_bytes: int, ids: list[str]) -> dict[str, Any]:
        """Write new parts; `splits` of the unit's marker.

        Args:
            is_validation: (documents,) bool.
            text_bytes: of these documents.
            ids: of these documents, for provenance. The train parts keep the bounds they had.
        """
        token_is_validation = np.repeat(is_validation, self.ends - self.starts)
        rest = self._old["text_bytes"] - text_bytes
        bounds = _bounds(self._parts)
        with UnitWriter(
            self._parts_folder,
            number=self._number,
            source=self._parts[0].source,
            layout=self._layout,
            fraction=self._fraction,
            stem=f"{self._number:08d}-divided",
        ) as writer:
            for name, mask, size in (
                ("train", ~token_is_validation, rest),
                ("validation", token_is_validation, text_bytes),
            ):
                tokens = self.tokens[mask]
                if len(tokens):
                    starts = np.flatnonzero(np.concatenate(([True], tokens[:-1] == self._eod)))
                    writer.add(name, tokens, starts, [], size)
            splits = writer.close()["splits"]
        return _with_inputs(splits, bounds, ids)


def _divide_rows(
    number: int, result: dict[str, Any], facts: dict[str, Any], parts: Path
) -> dict[str, Any]:
    """Pack a unit's dialogues anew, those nearest to being held out apart; new `splits`."""
    layout = layout_of(facts)
    old, nearest = result["splits"]["train"], result["nearest"]
    old_parts, chosen = [Part.of(part) for part in old["parts"]], set(nearest["documents"])
    with UnitWriter(
        parts,
        number=number,
        source=old_parts[0].source,
        layout=layout,
        fraction=facts["validation_fraction"],
        stem=f"{number:08d}-divided",
    ) as writer:
        packers = {
            name: RowPacker(layout, eod=facts["tokenizer"]["eod"], write=partial(writer.add, name))
            for name in SPLITS
        }
        place = 0
        for part in old_parts:
            for block in map_part(parts / part.name, part, layout):
                for dialogue in documents_of(block, layout):
                    if dialogue.loss.any():  # else it is padding
                        packers["validation" if place in chosen else "train"].add(dialogue)
                    place += 1
        for packer in packers.values():
            packer.close()
        splits = writer.close()["splits"]
    splits["train"]["text_bytes"] = old["text_bytes"] - nearest["text_bytes"]
    splits["validation"]["text_bytes"] = nearest["text_bytes"]
    return _with_inputs(splits, _bounds(old_parts), nearest["ids"])


def _bounds(parts: list[Part]) -> list[str]:
    """First and last document of all parts: one that fills several has its name in one of them."""
    inputs = [name for part in parts for name in part.inputs]
    return [inputs[0], inputs[-1]]


def _with_inputs(splits: dict[str, Any], bounds: list[str], ids: list[str]) -> dict[str, Any]:
    """The splits, their parts' provenance filled in: of train the bounds that it had."""
    for name, inputs in (("train", bounds), ("validation", [ids[0], ids[-1]])):
        for part in splits[name]["parts"]:
            part["inputs"] = inputs
    return splits
