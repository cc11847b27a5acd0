"""checkpoint.json: everything of a checkpoint that is no tensor, for people and programs.

Only this file knows its keys: everybody else reads the fields of `CheckpointRecord`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.config.data import DataConfig
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.errors import CheckpointError

T = TypeVar("T")
RECORD = "checkpoint.json"
CHAT_TEMPLATE = "chat_template.jinja"
"""Beside it, of a model of dialogues; transformers knows the file by this name."""
FORMAT = "pretrain-checkpoint"
VERSION = 2  # 1: tensors in torch DCP files
RETIRED = {"backend"}
"""Model settings in older records that are gone; the one value that ever ran is what runs now."""


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
    base: dict[str, str] | None = None
    """Of which weights the tensors are a part (adapters.Base); None: they are a whole model."""


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
            content = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"it cannot be read: {error}.") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError("it is not a checkpoint of this program.")
        if (version := content.pop("version", 0)) > VERSION:
            raise CheckpointError(
                f"it has checkpoint format {version}; "
                f"this program reads up to {VERSION}. Update it."
            )
        known = dataclasses.fields(cls)
        missing = [
            f.name
            for f in known
            if f.name not in content
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise CheckpointError(f"it is damaged: it has no {', '.join(sorted(missing))}.")
        return cls(**{f.name: content[f.name] for f in known if f.name in content})

    def to_json(self) -> str:
        """The content of checkpoint.json, keys in the order people read them."""
        head = ("step", "optimizer", "optimizer_step", "loss_scale", "vocab_size", "layout",
                "versions", "saved_at", "eod", "end_of_turn", "base", "state", "loader", "guard",
                "config", "size_bytes", "write_s")  # fmt: skip
        content = {
            "format": FORMAT,
            "version": VERSION,
            **{key: getattr(self, key) for key in head},
        }
        for key in ("eod", "end_of_turn", "base"):
            if content[key] is None:  # older records do not have the key, and stay as they are
                del content[key]
        return json.dumps(content, indent=1, ensure_ascii=False)

    def model(self) -> ModelConfig:
        """The architecture, its vocabulary size filled in.

        Raises:
            CheckpointError: the model settings are those of another program.
        """
        return dataclasses.replace(self._section("model", ModelConfig), vocab_size=self.vocab_size)

    def data(self) -> DataConfig:
        """What the run read and how, its held-out datasets too.

        Raises:
            CheckpointError: the data settings are those of another program.
        """
        return self._section("data", DataConfig)

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

    def _section(self, name: str, schema: type[T]) -> T:
        """A section of the run's settings as its dataclass."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            saved = self.config[name]
            kept = {key: value for key, value in saved.items() if key not in RETIRED}
            if "${" in json.dumps(kept):  # would be looked up here: ${oc.env:...}
                raise CheckpointError(f"the {name} settings in {RECORD} hold a ${{...}}.")
            node = OmegaConf.merge(OmegaConf.structured(schema), kept)
            return cast(T, OmegaConf.to_object(node))
        except (OmegaConfBaseException, KeyError) as error:
            raise CheckpointError(
                f"the {name} settings in {RECORD} are not understood: {error}."
            ) from error


def read_record(folder: Path) -> CheckpointRecord:
    """checkpoint.json of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable, or written by a newer version of this program.
    """
    path = folder / RECORD
    try:
        return CheckpointRecord.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is of no use: {error}") from None
