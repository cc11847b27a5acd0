"""What a run can know before it touches a device: its numbers, folder, checkpoints' fit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import cli, log
from pipeline.config import privacy_rules, rules
from pipeline.config.data import DatasetConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.distributed.ranks import Ranks, placement_warning
from pipeline.errors import ConfigError, DataError, MachineError, Problems
from pipeline.files import check_no_links, sha256_of, size_of, write_durably
from pipeline.resilience import ownership
from pipeline.resilience.bookkeeping import bookkeeping
from pipeline.training.in_words import sentences
from pipeline.training.prompts import misfitting_prompts

if TYPE_CHECKING:
    from pipeline.data.datasets import DataSummary
    from pipeline.data.reading_plan import ReadingPlan


def memory_advice(cfg: PretrainConfig, ranks: Ranks) -> str:
    """What the device was asked to hold, and the settings with which it would.

    Empty where that cannot be said, e.g. for a broken file in conf/devices/: the failure that it
    comes with is reported all the same.
    """
    from pipeline.data.datasets import describe
    from pipeline.planning.advice import advice
    from pipeline.planning.devices import device_here

    try:
        vocab_size = describe(cfg.data).vocab_size
        shape = derive(cfg, world_size=ranks.world_size, tokenizer_vocab_size=vocab_size)
        return advice(cfg, shape, device_here())
    except Exception as error:
        log.logger.warning("no advice about memory: %s: %s", type(error).__name__, error)
        return ""


class Start(NamedTuple):
    """What is known of a run before it begins."""

    cfg: PretrainConfig
    """The settings, with those that follow from the data."""
    shape: RunShape
    run_dir: Path
    reading: ReadingPlan


def check(cfg: PretrainConfig, *, world_size: int) -> Start:
    """The run's numbers, folder and data, after every check that costs no device time.

    Leaves no trace: nothing is written, so a start that is refused has changed nothing.

    Raises:
        PipelineError: settings, data, folder or checkpoints do not fit together; all that is wrong
            is named.
    """
    from pipeline.checkpoint import folder as folders
    from pipeline.data.datasets import describe, follow_data
    from pipeline.data.reading_plan import plan_reading
    from pipeline.training import continuation

    problems, data = Problems(), None
    with problems:
        data = describe(cfg.data)
    with problems:
        read = (data.vocab_size, data.row_tokens, data.row_pictures) if data else (None,) * 3
        known: Any = dict(zip(("tokenizer_vocab_size", "row_tokens", "pictures"), read))
        rules.check(cfg, world_size=world_size, **known)
    problems.raise_all()
    assert data is not None
    cfg = replace(cfg, data=follow_data(cfg.data, data))
    shape = derive(
        cfg,
        world_size=world_size,
        tokenizer_vocab_size=data.vocab_size,
        pictures=data.row_pictures,
    )
    run_dir = Path(cfg.runs_dir) / cfg.name
    with problems:
        # A lost one would end the run at its first evaluation. Training shards are many: preflight
        # looks for them, and who reads them says so.
        if lost := [*missing_shards(cfg.data.validation or [])]:
            raise DataError("\n".join(lost))
    with problems:
        check_folder(cfg, shape, run_dir)
    with problems:
        continuation.check(cfg, shape, run_dir)
    with problems:
        if (weights := first_weights(cfg, run_dir)) is not None:
            check_same_tokenizer(data, weights)
    with problems:
        if cfg.training.sample_every > 0:
            wrong = misfitting_prompts(cfg.training, data, seq_len=shape.seq_len)
            if found := "\n".join(wrong):
                raise ConfigError(found)
    reading = None
    with problems:
        places = folders.places(run_dir, cfg.checkpoint.fallback_dir)
        newest = continuation.newest_record(places) if cfg.checkpoint.resume else None
        saved = newest.loader if newest else None
        reading = plan_reading(cfg.data, data.train, shape=shape, seed=cfg.seed, saved=saved)
        if found := "\n".join(privacy_rules.delta(cfg.finetune.dp, reading.sequences)):
            raise ConfigError(found)
    problems.raise_all()
    assert reading is not None
    return Start(cfg, shape, run_dir, reading)


def missing_shards(datasets: Iterable[DatasetConfig]) -> Iterator[str]:
    """Shards of local datasets that are absent or have the wrong size."""
    from pipeline.data.manifest import Manifest

    for dataset in datasets:
        folder = Path(dataset.path)
        if "://" in dataset.path or not (folder / "manifest.json").is_file():
            continue  # who opens the dataset reads, or misses, the manifest
        manifest = Manifest.load(str(folder))
        wrong = [
            f"{path} ({found} bytes, {size} expected)"
            for path, size in zip(manifest.paths, manifest.shard_bytes, strict=True)
            if (found := size_of(folder / str(path))) != int(size)
        ]
        if wrong:
            yield (
                f"{folder}: {len(wrong)} of {len(manifest.paths)} shards are missing or truncated, "
                f"first {wrong[0]}. Copy the dataset again, or prepare it again with "
                "data_prep/tokenize.py."
            )


def run_folders(cfg: PretrainConfig) -> list[Path]:
    """The run's folder, and the one that takes its checkpoints when that does not, if it has one.

    Each of them may have one owner: two runs of one name share the second, whatever their runs_dir.
    """
    from pipeline.checkpoint import folder as folders

    places = folders.places(Path(cfg.runs_dir) / cfg.name, cfg.checkpoint.fallback_dir)
    own, *other = [place.parent for place in places]
    return [own, *(folder for folder in other if folder.resolve() != own.resolve())]


def own(cfg: PretrainConfig, *, node: str) -> ExitStack:
    """The run's folders as this process's own, until the block ends.

    Raises:
        MachineError: another process has one of them, and lives; or it cannot be written.
    """
    with ExitStack() as owned:
        for folder in run_folders(cfg):
            owned.enter_context(ownership.claim(folder, node=node))
        return owned.pop_all()


def begin(cfg: PretrainConfig, start: Start, ranks: Ranks) -> None:
    """The main rank, once the folder is its own: write config.yaml, and say what starts."""
    with bookkeeping(str(start.run_dir / "config.yaml")):
        write_durably(start.run_dir / "config.yaml", cli.to_yaml(cfg).encode())
    log.logger.info("run %s", start.run_dir)
    for sentence in sentences(cfg, start.shape):
        log.logger.info(sentence)
    if start.reading.used_up:
        log.logger.warning(start.reading.used_up)
    else:
        log.logger.info(f"the run reads {start.reading}")
    sizes = start.shape.sizes
    placement = placement_warning(
        ranks, tensor_parallel_size=sizes.tensor, context_parallel_size=sizes.context
    )
    for warning in [*start.reading.warnings(), *([placement] if placement else [])]:
        log.logger.warning(warning)


def check_folder(cfg: PretrainConfig, shape: RunShape, run_dir: Path) -> None:
    """Raise MachineError unless the run folder can be written and has room for its checkpoints.

    So must the folder that is to take them when the run folder does not.
    """
    from pipeline.checkpoint import folder as folders
    from pipeline.planning.plan import CHECKPOINT_BYTES_PER_PARAMETER
    from pipeline.planning.trained import num_trained_parameters

    trained = num_trained_parameters(cfg.model, cfg.finetune, shape.vocab_size)
    size = CHECKPOINT_BYTES_PER_PARAMETER * trained
    _check_room(run_dir, size, "runs_dir=... or name=...")
    for place in folders.places(run_dir, cfg.checkpoint.fallback_dir)[1:]:
        _check_room(place.parent, size, "checkpoint.fallback_dir=...")


def _check_room(folder: Path, checkpoint_bytes: int, setting: str) -> None:
    """Raise MachineError unless the folder can be made, written, and holds two checkpoints.

    The folder is made when the run begins; what is there already must take a file, which gets no
    name, or loses it at once, and lead nowhere else.
    """
    if folder.is_dir():
        check_no_links(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise MachineError(
            f"the run folder {folder} cannot be written ({error.strerror}). "
            f"Choose another with {setting}"
        ) from None
    free = shutil.disk_usage(there).free
    if free < 2 * checkpoint_bytes:  # the newest checkpoint and the one being written
        raise MachineError(
            f"the disk of {folder} has {log.in_units(free)} free; two checkpoints of this model "
            f"need {log.in_units(2 * checkpoint_bytes)}. "
            f"Free some space or choose another disk with {setting}"
        )


def first_weights(cfg: PretrainConfig, run_dir: Path) -> Path | None:
    """The checkpoint or Hugging Face folder that training will start from; None: from nothing.

    Raises:
        CheckpointError: checkpoint.init_from is neither.
    """
    from pipeline.checkpoint import folder as folders

    if cfg.checkpoint.resume:
        places = folders.places(run_dir, cfg.checkpoint.fallback_dir)
        for _, path in reversed(folders.list_places(places)):
            if folders.whole_record(path):
                return path
    if cfg.checkpoint.init_from is None:
        return None
    path = Path(cfg.checkpoint.init_from)
    return path if (path / "config.json").is_file() else folders.find(path)


def check_same_tokenizer(data: DataSummary, weights: Path) -> None:
    """Raise DataError unless an id means the same text in the data as it did to the weights.

    Args:
        data: its tokenizer and the token that ends its documents.
        weights: a checkpoint or a Hugging Face folder.
    """
    from pipeline.checkpoint import folder as folders
    from pipeline.data.tokenizer import Tokenizer

    file = weights / "tokenizer.json"
    if not file.is_file():
        if (weights / "config.json").is_file():
            raise DataError(
                f"{weights} has no tokenizer.json: nobody can tell whether the data's ids are its "
                "own. Put the file there that made them; transformers writes it from vocab.json "
                "or tokenizer.model: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        log.logger.warning(
            "%s has no tokenizer.json: nobody can tell whether the data's ids are its own", weights
        )
        return
    if (theirs := sha256_of(file)) != data.tokenizer_sha256:
        # Other bytes may give the same ids: an export drops templates. Which token ends documents
        # does not matter for that; id 0 spares the guess, which may fail.
        tokenizers = (
            Tokenizer(data.tokenizer_json, path="the data's tokenizer.json", eod=data.eod),
            Tokenizer.from_file(file, eod=0),
        )
        if tokenizers[0].ids_sha256 != tokenizers[1].ids_sha256:
            raise DataError(
                f"the weights in {weights} know another tokenizer (sha256 {theirs[:12]}) than the "
                f"data was made with ({data.tokenizer_sha256[:12]}): the same id means different "
                f"text. Prepare the data with theirs: data_prep/tokenize.py tokenizer={file} ..."
            )
    record = folders.whole_record(weights) if (weights / folders.RECORD).is_file() else None
    if record is not None and record.eod not in (None, data.eod):
        raise DataError(
            f"the weights in {weights} know id {record.eod} as the end of a document, the data has "
            f"id {data.eod}. Prepare the data with data_prep/tokenize.py eod={record.eod} ..."
        )
