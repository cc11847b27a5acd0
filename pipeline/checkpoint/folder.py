"""Checkpoints as folders: which ones exist, which are whole, which is the newest; no torch.

    checkpoints/.step-00001000.saving/   being written
    checkpoints/step-00001000/           whole: one rename, after every file is on the disk
        rank-00000.safetensors ...       tensors, of each rank a file or several
        tensors.json                     which rectangle of which tensor is in which file
        checkpoint.json                  everything else, for people and programs
        tokenizer.json                   so that the folder can be exported by itself
        SHA256SUMS                       `sha256sum -c SHA256SUMS` checks every other file
    checkpoints/latest                   name of the newest one, for scripts
    checkpoints/best                     likewise of the best one, and its held-out loss

A kill at any moment leaves the previous checkpoint, or the new one; never a half of either under a
final name.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.checkpoint.record import RECORD, CheckpointRecord, read_record
from pipeline.errors import CheckpointError
from pipeline.files import read_file, sha256_of, sync_folder, write_durably
from pipeline.resilience.bookkeeping import bookkeeping

SUMS = "SHA256SUMS"
LATEST, BEST = "latest", "best"
TOKENIZER = "tokenizer.json"
INDEX, METADATA = "tensors.json", ".metadata"  # of the tensors: this version's, version 1's
_NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def saving_folder(root: Path, step: int) -> Path:
    """Where a step's checkpoint is written before it is whole."""
    return root / f".{name_of(step)}.saving"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of finished checkpoints under `root`, oldest first; perhaps damaged since."""
    if not root.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def places(run_dir: Path, fallback_dir: str | None) -> list[Path]:
    """Folders that may hold the checkpoints of a run, the one that is preferred first."""
    fallback = [Path(fallback_dir) / run_dir.name / "checkpoints"] if fallback_dir else []
    return [run_dir / "checkpoints", *fallback]


def list_places(roots: Sequence[Path]) -> list[tuple[int, Path]]:
    """(step, folder) of finished checkpoints in any of the places, oldest first.

    Of one step that is in several, the preferred place's comes last.
    """
    found = [
        (step, -number, path)
        for number, root in enumerate(roots)
        for step, path in list_checkpoints(root)
    ]
    return [(step, path) for step, _, path in sorted(found)]


def find(path: Path) -> Path:
    """The checkpoint folder that a user means by `path`.

    A checkpoint is itself; a run folder, or a folder of checkpoints, means its newest; the files
    `latest` and `best` mean what they name.

    Raises:
        CheckpointError: there is none.
    """
    if (path / RECORD).is_file():
        return path
    if path.name in (LATEST, BEST) and path.is_file():
        if (named := path.parent / _named(path)) and (named / RECORD).is_file():
            return named
        raise CheckpointError(f"{path} names {named}, which is no checkpoint any more.")
    for root in (path / "checkpoints", path):
        if checkpoints := list_checkpoints(root):
            return checkpoints[-1][1]
    if (path / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"the run {path} has no checkpoint yet: one is written every checkpoint.save_every "
            "steps, at the end, and on a first Ctrl-C."
        )
    what = (
        f"is no checkpoint (it has no {RECORD}) and holds none" if path.is_dir() else "is no folder"
    )
    raise CheckpointError(
        f"{path} {what}. Give runs/NAME, or one of its checkpoints: "
        f"runs/NAME/checkpoints/{name_of(1000)}.{_runs_near(path)}"
    )


def _runs_near(path: Path) -> str:
    """The newest runs that `path` may have meant; empty: none is seen."""
    found: dict[Path, float] = {}
    for folder in (path, path.parent, Path("runs")):
        with contextlib.suppress(OSError, ValueError):  # a name with a NUL is no file's
            runs = [run for run in folder.iterdir() if list_checkpoints(run / "checkpoints")]
            found |= {run: run.stat().st_mtime for run in runs}
    newest = sorted(found, key=lambda run: -found[run])[:4]
    return f" There are {', '.join(map(str, newest))}." if newest else ""


def check_new(output: Path) -> None:
    """Raise CheckpointError unless the folder may be written: not there yet, or empty."""
    try:
        is_new = not any(output.iterdir())
    except FileNotFoundError:
        is_new = not output.is_symlink()
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror}.") from None
    if not is_new:
        raise CheckpointError(f"{output} is not empty. Choose another output=, or delete it.")


def sums_text(sums: dict[str, str]) -> str:
    """Content of SHA256SUMS: file name to hex digest, in the form of the sha256sum command."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """File name to hex digest, as SHA256SUMS of a checkpoint says.

    Raises:
        CheckpointError: the list is missing or damaged.
    """
    try:
        text = read_file(folder / SUMS, inside=folder).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / SUMS} cannot be read: {error}.") from None
    rows = [line.partition("  ") for line in text.splitlines()]
    sums = {name: digest for digest, _, name in rows}
    # The list itself has no checksum: it must be, byte for byte, what would be written for its own
    # content.
    is_clean = all(
        re.fullmatch(r"[0-9a-f]{64}", digest) and "/" not in name for name, digest in sums.items()
    )
    has_index = INDEX in sums or METADATA in sums
    if sums_text(sums) != text or not is_clean or RECORD not in sums or not has_index:
        raise CheckpointError(f"{folder / SUMS} is damaged.")
    return sums


def whole_record(folder: Path) -> CheckpointRecord | None:
    """The record of a checkpoint whose small files are undamaged; None: restore will not take it.

    One flipped bit leaves JSON that can be read: another width, another step, another tokenizer. A
    start that believed it would be refused as another run's, and the good checkpoint before would
    not be looked at.
    """
    try:
        sums = read_sums(folder)
        names = {RECORD, TOKENIZER} & sums.keys()
        if any(sha256_of(folder / name) != sums[name] for name in names):
            return None
        return read_record(folder)
    except (OSError, CheckpointError):
        return None


def holds_tensors(name: str) -> bool:
    """Whether a file is a rank's tensors, of this version or of version 1; the others are small."""
    return name.endswith((".safetensors", ".distcp"))


def damage(
    folder: Path,
    *,
    of: Callable[[str], bool] = lambda name: True,
    part: int = 0,
    parts: int = 1,
    num_threads: int = 4,
) -> list[str]:
    """What is wrong with a checkpoint, one line a file; empty: every byte is as it was written.

    Args:
        folder: of the checkpoint.
        of: file name to whether it is checked.
        part, parts: check only every parts-th file, beginning with the part-th, so that ranks share
            the work.
        num_threads: that read, a file each.
    """
    try:
        sums = read_sums(folder)
    except CheckpointError as error:
        return [str(error)]

    def check(name: str) -> str | None:
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        return (
            None
            if found == sums[name]
            else f"{name}: content is not what was written (SHA-256 differs)"
        )

    names = sorted(filter(of, sums))[part::parts]
    with ThreadPoolExecutor(num_threads) as pool:
        return [problem for problem in pool.map(check, names) if problem]


def publish(root: Path, record: CheckpointRecord, sums: dict[str, str]) -> Path:
    """Turn a saving folder, whose tensors are written, into a checkpoint; moves `latest` last.

    Args:
        record: what checkpoint.json says.
        sums: SHA-256 of the files that are there already.
    """
    folder, final = saving_folder(root, record.step), root / name_of(record.step)
    # A path that is no UTF-8 has halves of surrogate pairs; escaped as \\udcff they are JSON's own.
    sums = {
        **sums,
        RECORD: write_durably(folder / RECORD, record.to_json().encode(errors="backslashreplace")),
    }
    write_durably(folder / SUMS, sums_text(sums).encode())
    # There is one if the step was trained again, after a rollback. It only loses its name now: to
    # delete it takes seconds, in which a kill would leave no checkpoint of the step at all.
    doomed = _take_name(final) if final.exists() else None
    os.rename(folder, final)
    sync_folder(root)
    with bookkeeping(str(root / LATEST)):  # the checkpoint is whole, and found by its name
        write_durably(root / LATEST, f"{final.name}\n".encode())
    if doomed:
        shutil.rmtree(doomed, ignore_errors=True)
    return final


def remove(folder: Path) -> None:
    """Delete a checkpoint.

    It loses its name first, so that a half-deleted one is never taken for a checkpoint.
    """
    shutil.rmtree(_take_name(folder), ignore_errors=True)


def _take_name(folder: Path) -> Path:
    """Rename a checkpoint to what `clear_leftovers` deletes; its new path."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    return doomed


def clear_leftovers(root: Path) -> None:
    """Delete what killed or failed saves left half-written or half-deleted."""
    for path in [*root.glob(".step-*.saving"), *root.glob(".step-*.deleting")]:
        shutil.rmtree(path, ignore_errors=True)


def prune(root: Path, *, written: int, keep_last: int, keep_every: int) -> list[Path]:
    """Delete old checkpoints; returns them.

    The newest `keep_last` (at least 1) and the multiples of `keep_every` stay, and whatever their
    number the step that was just `written` and those that `latest` and `best` name: a run that was
    set back writes steps below others that are still there.
    """
    steps = [step for step, _ in list_checkpoints(root)]
    kept = {name_of(written), _named(root / LATEST), _named(root / BEST)}
    gone = [
        step
        for step in to_prune(steps, keep_last=keep_last, keep_every=keep_every)
        if name_of(step) not in kept
    ]
    for step in gone:
        remove(root / name_of(step))
    return [root / name_of(step) for step in gone]


def _named(file: Path) -> str:
    """The name that `latest` or `best` begins with, '' where none can be read."""
    try:
        return read_file(file).decode("utf-8", "replace").partition("\n")[0].strip()
    except OSError:
        return ""


def mark_best(places: Sequence[Path], step: int, loss: float) -> None:
    """Let `best` name the checkpoint of a step, wherever it is; one `best` there is at a time.

    Args:
        loss: held out, nats per token; what the next one must beat.
    """
    for root in places:
        if (root / name_of(step) / RECORD).is_file():
            write_durably(root / BEST, f"{name_of(step)}\nloss {loss!r}\n".encode())
            for other in places:
                if other != root:
                    (other / BEST).unlink(missing_ok=True)
            return


def best_loss(places: Sequence[Path]) -> float | None:
    """Of the checkpoint that `best` names; None where there is none, or it is gone."""
    for root in places:
        try:
            name, _, loss = read_file(root / BEST).decode("utf-8", "replace").partition("\nloss ")
            if (root / name / RECORD).is_file() and _NAME.fullmatch(name):
                return float(loss)
        except (OSError, ValueError):
            continue
    return None


def to_prune(steps: Iterable[int], *, keep_last: int, keep_every: int) -> list[int]:
    """The steps that go; pure."""
    ordered = sorted(steps)
    return [s for s in ordered[: -max(1, keep_last)] if not (keep_every and s % keep_every == 0)]


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither loaded nor counted; its new path."""
    target, number = folder.with_name(f"damaged-{folder.name}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    os.rename(folder, target)
    return target
