"""checkpoint.json: everything of a checkpoint that is no tensor, for people and programs.

Only this file knows its keys: everybody else reads the fields of `CheckpointRecord`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline import cli
from pipeline.config import model_rules
from pipeline.config.data import DataConfig
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.operation import TrackingConfig
from pipeline.config.training import TrainingConfig
from pipeline.errors import CheckpointError
from pipeline.files import parse_json, read_file
from pipeline.shapes import COUNT, misfits

T = TypeVar("T")
RECORD = "checkpoint.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""Beside it, of a model of dialogues; transformers knows the file by this name."""
FORMAT = "pretrain-checkpoint"
VERSION = 2  # 1: tensors in torch DCP files
MOST_ATTACHED = 1 << 28  # as large as a tokenizer may be
RETIRED = {"backend"}
"""Model settings in older records that are gone; the one value that ever ran is what runs now."""
_BY_DATASET = {str: COUNT}
# What is read of the file; `?`: may be missing, in older records too.
SHAPE = {
    "step": COUNT,
    "optimizer": str,
    "optimizer_step": COUNT,
    "loss_scale": (None, {"scale": float, "good_steps": range(2**31)}),
    "vocab_size": range(1, 2**31),
    "layout": {str: COUNT},
    "versions": {str: str},
    "saved_at": str,
    "eod?": (None, range(2**31)),
    "end_of_turn?": (None, range(2**31)),
    "image_token_id?": (None, range(2**31)),
    "base?": (None, {"path": str, "sha256": str}),
    "privacy?": (
        None,
        {"epsilon": float, "delta": float, "clip_norm": float, "noise_multiplier": float}
        | {"reads": COUNT, "unit": str, "salt?": str}
        | {"with_earlier?": {key: float for key in ("epsilon", "delta", "epsilons", "deltas")}},
    ),
    "spent_before?": (
        None,
        [{"epsilon": float, "delta": float, "noise_multiplier": float, "reads": COUNT}],
    ),
    "state": {str: COUNT},
    "config": {
        **{f"{section}?": dict for section in ("model", "data", "training")},
        "finetune?": {"train?": [str], "lora_targets?": [str]},
        "optimizer?": {"lr?": float},
        "name?": str,
        "seed?": int,  # -1 is one too
    },
    "loader?": {
        "step?": COUNT,
        "samples_seen?": COUNT,
        "order?": {"seq_len": range(1, 2**31)},
        "ledger?": _BY_DATASET,
        "segments?": [
            {"start": COUNT, "weights": {str: float}, "slots": _BY_DATASET, "consumed": _BY_DATASET}
        ],
        "datasets?": {str: {"name": str, "path": str}},
    },
    "guard?": {
        "history?": [float],
        "ledger?": [
            {"step": COUNT, "kind": str, "action": str, "loss": (None, float)}
            | {"limit": (None, float)}
        ],
        "bad_in_a_row?": COUNT,
        "overflows_in_a_row?": COUNT,
    },
    "size_bytes?": range(2**62),
    "write_s?": float,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run gives to its checkpoint and gets back as it was; JSON-able."""

    state: dict[str, Any]
    """Fields of the trainer's TrainState: step, tokens_seen, samples_seen, ..."""
    config: dict[str, Any]
    """All settings of the run."""
    loader: dict[str, Any] = field(default_factory=dict)
    """Where the data order stands, and of which datasets."""
    guard: dict[str, Any] = field(default_factory=dict)
    """History and ledger of bad steps."""
    eod: int | None = None
    """Id of the token that ends the documents of the datasets; None: of an older program."""
    end_of_turn: int | None = None
    """Id of the token that ends an answer; None: the datasets were no dialogues."""
    image_token_id: int | None = None
    """Id of the token that stands for a patch; None: the datasets had no pictures."""
    base: dict[str, str] | None = None
    """Of which weights the tensors are a part (adapters.Base); None: they are a whole model."""
    privacy: dict[str, Any] | None = None
    """What a private run has spent (training/privacy.py); None: training is not private."""
    spent_before: list[dict[str, Any]] | None = None
    """What private runs had spent on the first weights of this one; None: there was none, or it
    left no word.
    """


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(RunRecord):
    """The content of checkpoint.json."""

    step: int
    """Optimizer steps done."""
    optimizer: str
    """Name of the optimizer whose state is in the tensors."""
    optimizer_step: int
    """Steps that were applied: without skipped ones."""
    loss_scale: dict[str, Any] | None
    """fp16's scale and its counters; None at other precisions."""
    vocab_size: int
    """Of the model, the tokenizer's where the config left it open."""
    layout: dict[str, int]
    """Sizes of the layout that wrote it; any other reads it."""
    versions: dict[str, str]
    """Of torch, deepspeed, megatron-core."""
    saved_at: str
    """When the save began, UTC."""
    size_bytes: int = 0
    """Of the tensors."""
    write_s: float = 0.0
    """Seconds in the background until the tensors were on the disk."""

    @property
    def tokens_seen(self) -> int:
        """Tokens the run had trained on."""
        return self.state.get("tokens_seen", 0)

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """Identity (sha256) of every training dataset to its name, path and place in the order."""
        return self.loader.get("datasets", {})

    @classmethod
    def from_json(cls, text: str) -> CheckpointRecord:
        """The record that `to_json` wrote.

        Raises:
            CheckpointError: not such a record, or one of a newer version of this program.
        """
        try:
            content = parse_json(text)
        except ValueError as error:
            raise CheckpointError(f"it cannot be read: {error}.") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError("it is not a checkpoint of this program.")
        if type(version := content.pop("version", 0)) is not int or version > VERSION:
            raise CheckpointError(
                f"it has checkpoint format {version}; "
                f"this program reads up to {VERSION}. Update it."
            )
        if wrong := list(itertools.islice(misfits(content, SHAPE), 3)):
            raise CheckpointError(f"it is damaged: {'; '.join(wrong)}.")
        known = dataclasses.fields(cls)
        return cls(**{f.name: content[f.name] for f in known if f.name in content})

    def to_json(self) -> str:
        """The content of checkpoint.json, keys in the order people read them."""
        head = ("step", "optimizer", "optimizer_step", "loss_scale", "vocab_size", "layout",
                "versions", "saved_at", "eod", "end_of_turn", "image_token_id", "base", "privacy",
                "spent_before", "state", "loader", "guard", "config", "size_bytes",
                "write_s")  # fmt: skip
        content = {
            "format": FORMAT,
            "version": VERSION,
            **{key: getattr(self, key) for key in head},
        }
        optional = ("eod", "end_of_turn", "image_token_id", "base", "privacy", "spent_before")
        for key in optional:
            if content[key] is None:  # older records do not have the key, and stay as they are
                del content[key]
        return json.dumps(content, indent=1, ensure_ascii=False)

    def model(self) -> ModelConfig:
        """The architecture, its vocabulary size filled in.

        Raises:
            CheckpointError: the model settings are those of another program, or of no model.
        """
        model = dataclasses.replace(self._section("model", ModelConfig), vocab_size=self.vocab_size)
        if problem := next(model_rules.alone(model), None):
            raise CheckpointError(f"the model settings in {RECORD} are of no model: {problem}")
        return model

    def data(self) -> DataConfig:
        """What the run read and how, its held-out datasets too; not where it kept remote shards.

        A stranger's checkpoint would say where this machine writes, and prunes what is there.

        Raises:
            CheckpointError: the data settings are those of another program.
        """
        plain = DataConfig()
        return dataclasses.replace(
            self._section("data", DataConfig),
            cache_dir=plain.cache_dir,
            cache_size_gib=plain.cache_size_gib,
        )

    def finetune(self) -> FinetuneConfig:
        """What was trained; everything, in a record of an older program.

        Raises:
            CheckpointError: the settings are those of another program.
        """
        return (
            self._section("finetune", FinetuneConfig)
            if "finetune" in self.config
            else FinetuneConfig()
        )

    def training(self) -> TrainingConfig:
        """Batch, lengths and precision of the run; what newer programs add is let be.

        Raises:
            CheckpointError: the training settings are those of another program.
        """
        return self._section("training", TrainingConfig, keys=_names(TrainingConfig))

    def tracking(self) -> TrackingConfig:
        """Who was told of the run; what newer programs add is let be.

        Raises:
            CheckpointError: the tracking settings are those of another program.
        """
        return self._section("tracking", TrackingConfig, keys=_names(TrackingConfig))

    def _section(self, name: str, schema: type[T], *, keys: set[str] | None = None) -> T:
        """A section of the run's settings, or these keys of it, as its dataclass."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            saved = self.config[name]
            kept = {key: value for key, value in saved.items() if key not in RETIRED}
            kept = {key: kept[key] for key in kept if keys is None or key in keys}
            # Literally: a stranger's ${oc.env:...} would be looked up; a folder may be called so.
            node = OmegaConf.merge(OmegaConf.structured(schema), cli.literal(kept))
            return cast(T, OmegaConf.to_object(node))
        # Beside its own errors OmegaConf lets those of Python through, as of a list for a table.
        except (
            OmegaConfBaseException,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise CheckpointError(
                f"the {name} settings in {RECORD} are not understood: {error}."
            ) from error


def _names(section: type) -> set[str]:
    return {field.name for field in dataclasses.fields(section)}


def attachment(folder: Path, name: str) -> bytes | None:
    """A small file that travels with a checkpoint's tensors; None: this one has none.

    Raises:
        CheckpointError: it is no ordinary file of the folder: what a link leads to is not what its
            author wrote, and an export would hand it on.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        return read_file(path, most=MOST_ATTACHED, inside=folder)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def read_record(folder: Path) -> CheckpointRecord:
    """checkpoint.json of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable, or written by a newer version of this program.
    """
    path = folder / RECORD
    try:
        return CheckpointRecord.from_json(read_file(path, inside=folder).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is of no use: {error}") from None
