"""Activations of one place of a model, as a stream of WebDataset tars: in order, resumable.

    windows w, w + 1, ... -> shards of `shard_sequences` windows -> OUT/activations-00000000.tar
        000000017.tokens.npy        (n,) int32
        000000017.activations.npy   (n, H): what stood at the place when these tokens were read
    OUT/plan.json                   written first: what is dumped; another plan is refused
    OUT/done/00000000.json          written when a shard is whole: its size and sha256
    OUT/manifest.json               written last

A shard is written by one data-parallel rank, whole, so copies of the model share the shards and
not the sequences: which windows a shard holds does not depend on the layout, and what a kill leaves
behind is missing shards.

B micro-batch, S sequence, H hidden.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoint.agreement import Agreement
from pipeline.data.validation import count_windows, validation_batches
from pipeline.errors import ConfigError, MachineError
from pipeline.files import parse_json, read_file, whole_file, write_durably
from pipeline.log import logger
from pipeline.model.tensor_parallel import gather_sequence
from pipeline.probing.passage import blocks_of, hooked
from pipeline.probing.places import Place

if TYPE_CHECKING:
    from pipeline.config.evaluation import Evaluation
    from pipeline.config.run_shape import ForwardShape
    from pipeline.data.batch import Batch
    from pipeline.data.datasets import Dataset
    from pipeline.engine.forward_only import ForwardOnly

MOST_BYTES = 1 << 20
"""Of plan.json and of a marker."""


@dataclass(frozen=True)
class DumpPlan:
    """What is dumped; the same plan goes on where it ended."""

    checkpoint: str
    precision: str
    mask_documents: bool
    reset_positions: bool
    place: str
    dtype: str
    hidden_size: int
    seq_len: int
    shard_sequences: int
    datasets: list[dict[str, Any]]
    """path, identity, and sequences that are read, from the first one on."""

    def shards(self) -> list[Shard]:
        """All of them, in their order."""
        found: list[Shard] = []
        before = 0
        for number, dataset in enumerate(self.datasets):
            count = int(dataset["sequences"])
            for begin in range(0, count, self.shard_sequences):
                size = min(self.shard_sequences, count - begin)
                found.append(Shard(len(found), number, begin, size, before + begin))
            before += count
        return found


@dataclass(frozen=True)
class Shard:
    """One tar."""

    number: int
    dataset: int
    begin: int
    """First window of it in its dataset."""
    size: int
    """How many windows."""
    first_key: int
    """Number of its first window over all datasets."""

    @property
    def name(self) -> str:
        """Of the file."""
        return f"activations-{self.number:08d}.tar"

    def marker(self, folder: Path) -> Path:
        """The file that says that it is whole."""
        return folder / "done" / f"{self.number:08d}.json"


class Dump:
    """Writes the shards that are not there. Methods are collective: call on every rank."""

    def __init__(
        self,
        model: ForwardOnly,
        plan: DumpPlan,
        folder: Path,
        *,
        read: Callable[[Shard], Iterator[Batch]],
        micro_batch_size: int,
    ) -> None:
        """Prepare to write.

        Args:
            folder: on a file system that all ranks see.
            read: the micro-batches of a shard's windows, on every rank of a copy of the model.
            micro_batch_size: their sequences.
        """
        self.model, self.plan, self.folder, self.read = model, plan, folder, read
        self.rows = micro_batch_size
        self.place = Place.of(plan.place, num_layers=model.model.num_layers)
        self.agreement = Agreement(model.layout.host_group)

    def run(self) -> int:
        """Write what is missing; how many shards that were.

        Raises:
            ConfigError: the folder holds another dump, or cannot be used.
            MachineError: a shard cannot be written.
        """
        problem, missing = self.agreement.on_main(self._begin)
        if problem:
            raise ConfigError(problem)
        copies, mine = self.model.layout.data.size, self.model.layout.data.rank
        for start in range(0, len(missing), copies):
            together = missing[start : start + copies]
            # Evaluation counts tokens over all copies of the model: all make as many passes.
            passes = max(-(-shard.size // self.rows) for shard in together)
            is_real = mine < len(together)
            self._write(together[mine if is_real else 0], passes, keeps=is_real)
            if self.model.layout.ranks.is_main:
                logger.info(f"{min(start + copies, len(missing))} of {len(missing)} shards written")
        self.agreement.agree(lambda: None)  # all are there
        self.agreement.on_main(self._finish)
        return len(missing)

    def _begin(self) -> tuple[str, list[Shard]]:
        """(why the folder cannot be used, the missing shards); on the main rank."""
        path, wanted = self.folder / "plan.json", asdict(self.plan)
        try:
            if path.exists():
                found = parse_json(read_file(path, most=MOST_BYTES))
                if found != wanted:
                    return _another(self.folder, found, wanted), []
            elif self.folder.exists() and any(self.folder.iterdir()):
                return f"{self.folder} holds other files: choose another output=FOLDER.", []
            else:
                write_durably(path, json.dumps(wanted, indent=1).encode())
            return "", [s for s in self.plan.shards() if not s.marker(self.folder).exists()]
        except (OSError, ValueError) as error:
            return f"{self.folder} cannot be used ({error}): choose another output=FOLDER.", []

    def _finish(self) -> None:
        """manifest.json: the plan and every shard's marker."""
        shards = []
        for shard in self.plan.shards():
            shards.append(parse_json(read_file(shard.marker(self.folder), most=MOST_BYTES)))
        whole = asdict(self.plan) | {"tokens": sum(s["tokens"] for s in shards), "shards": shards}
        write_durably(self.folder / "manifest.json", json.dumps(whole, indent=1).encode())

    def _write(self, shard: Shard, passes: int, *, keeps: bool) -> None:
        """One shard; `passes` micro-batches are run, `keeps`: what comes of it is written."""
        writes = keeps and self.place.block in blocks_of(self.model)
        writes = writes and self.model.layout.tensor.rank == 0
        stream = self._samples(shard, passes)
        if not writes:
            for _ in stream:
                pass
            return
        path = self.folder / shard.name
        tokens = 0
        try:
            with whole_file(path) as file:
                digest = _Digest(file)
                with tarfile.open(fileobj=digest, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                    for key, ids, values in stream:
                        _add(tar, f"{key:09d}.tokens.npy", ids)
                        _add(tar, f"{key:09d}.activations.npy", values)
                        tokens += len(ids)
            facts = {
                "name": shard.name,
                "sequences": shard.size,
                "tokens": tokens,
                "bytes": digest.size,
                "sha256": digest.sha256.hexdigest(),
            }
            write_durably(shard.marker(self.folder), json.dumps(facts).encode())
        except OSError as error:
            raise MachineError(f"{path} cannot be written: {error.strerror or error}.") from error

    def _samples(self, shard: Shard, passes: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(key, tokens, activations) of a shard's windows, without what only fills them up."""
        stream, packed = self.read(shard), self.plan.datasets[shard.dataset]["packed"]
        last: Batch | None = None
        for _ in range(passes):
            batch = next(stream, None)
            if batch is None:  # another copy's shard is longer: the last batch once more, unseen
                assert last is not None, "a shard has a window"
                self._catch(last)
                continue
            last, values = batch, self._catch(batch)
            for row, window in enumerate(batch.sample_ids.tolist() if values is not None else ()):
                if window >= shard.begin + shard.size:
                    continue
                size = batch.tokens.shape[1] if packed else _real_tokens(batch, row)
                ids = batch.tokens[row, :size].to("cpu", torch.int32).numpy()
                assert values is not None
                key = shard.first_key + window - shard.begin
                yield key, ids, values[row, :size].cpu().numpy()

    def _catch(self, batch: Batch) -> Tensor | None:
        """(B, S, H) at the place, in the dump's dtype; None where another stage has it."""
        schema, caught = self.model.schema, []
        block = blocks_of(self.model).get(self.place.block)

        def catch(_module: Any, inputs: Any, out: Any) -> None:
            value = inputs[0] if self.place.part == "input" else out
            if self.place.part in ("input", "block"):
                value = schema.between.unpack(value).hidden
            value = value[0] if isinstance(value, tuple) else value
            whole = gather_sequence(value) if schema.sequence_ranks > 1 else value
            caught.append(whole.to(getattr(torch, self.plan.dtype)))

        if block is None:
            self.model.evaluate([batch])
            return None
        part = getattr(block, self.place.part, block)
        with hooked(part, catch):
            self.model.evaluate([batch])
        return caught[0]


def plan_of(
    evaluation: Evaluation,
    datasets: Sequence[Dataset],
    *,
    checkpoint: str,
    place: str,
    dtype: str,
    shard_sequences: int,
    seq_len: int,
) -> DumpPlan:
    """The plan that a request comes to."""
    rows = []
    for dataset in datasets:
        there = count_windows(dataset, seq_len=seq_len)
        asked = evaluation.sequences
        rows.append(
            {
                "path": dataset.path,
                "identity": dataset.identity,
                "packed": dataset.is_packed,
                "sequences": min(asked, there) if asked else there,
            }
        )
    data = evaluation.data
    return DumpPlan(
        checkpoint=checkpoint,
        precision=evaluation.precision.name,
        mask_documents=data.mask_documents,
        reset_positions=data.reset_positions,
        place=place,
        dtype=dtype,
        hidden_size=evaluation.model.hidden_size,
        seq_len=seq_len,
        shard_sequences=shard_sequences,
        datasets=rows,
    )


def reading(
    model: ForwardOnly, datasets: Sequence[Dataset], evaluation: Evaluation, shape: ForwardShape
) -> Callable[[Shard], Iterator[Batch]]:
    """What gives a copy of the model all windows of a shard."""

    def read(shard: Shard) -> Iterator[Batch]:
        return validation_batches(
            datasets[shard.dataset],
            seq_len=shape.seq_len,
            micro_batch_size=shape.micro_batch_size,
            data_rank=0,
            data_parallel_size=1,
            num_sequences=shard.size,
            device=model.layout.device,
            cfg=evaluation.data,
            begin=shard.begin,
        )

    return read


class _Digest:
    """A file that is hashed as it is written, in order."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)


def _add(tar: tarfile.TarFile, name: str, array: np.ndarray) -> None:
    """An npy member; owner and time 0, so that the same values are the same bytes."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    info = tarfile.TarInfo(name)
    info.size = content.tell()
    content.seek(0)
    tar.addfile(info, content)


def _real_tokens(batch: Batch, row: int) -> int:
    """Tokens of a text's window that have a label; a shard's last window is filled up."""
    assert batch.loss_mask is not None
    return int(batch.loss_mask[row].nonzero().max()) + 1


def _another(folder: Path, found: Any, wanted: dict[str, Any]) -> str:
    """Why a dump does not go on in a folder."""
    there = found if isinstance(found, dict) else {}
    changed = [f"{k} {there.get(k)!r}, now {v!r}" for k, v in wanted.items() if there.get(k) != v]
    return (
        f"{folder} holds a dump of something else ({'; '.join(changed)[:500]}): ask for the same "
        "again to go on with it, or choose another output=FOLDER."
    )
