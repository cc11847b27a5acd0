"""Dialogues to packed rows: one unit's way from messages to parts.

Talk --template, tokenizer--> ids, loss --hash--> split --first fit--> rows -> UnitWriter
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_prep.sources.dialogues import check_kinds, read_talks
from data_prep.sources.inputs import Unit, find_units
from data_prep.sources.rejects import Rejects
from data_prep.sources.text import text_bytes
from data_prep.tokens import dataset_writer
from data_prep.tokens.dataset_job import (
    DatasetJobConfig,
    identity_of,
    job_facts,
    open_dataset_job,
    record_rejects,
    run_dataset_job,
)
from data_prep.tokens.rows import Dialogue, RowPacker
from data_prep.tokens.split import SPLITS, UnitWriter, check_fraction, digest_text
from pipeline.data.chat import ChatTemplate, Rejected
from pipeline.data.shard_format import (
    BLOCK_TOKENS,
    PACKED_VERSION,
    ShardLayout,
    TokenizerIdentity,
    token_dtype,
)
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError
from pipeline.files import read_file
from pipeline.log import logger

TEMPLATES = Path(__file__).resolve().parents[1] / "chat"
CHATML_TOKENS = {"<|im_start|>", "<|im_end|>"}


@dataclass
class ConversationConfig(DatasetJobConfig):
    """Settings of data_prep.conversations."""

    row_tokens: int = MISSING
    """Tokens of a packed row; training.seq_len must be the same."""
    template: str | None = None
    """Jinja file, or one of our own: chatml, plain; null: chatml where the tokenizer has its
    tokens, else plain.
    """


def prepare(cfg: ConversationConfig) -> None:
    """Do this task's share; the task that finds all units done makes the datasets.

    Raises:
        PipelineError: see docs/dialogues.md.
    """
    check_fraction(cfg.validation_fraction)
    if not 2 <= cfg.row_tokens <= BLOCK_TOKENS:
        raise ConfigError(f"row_tokens ({cfg.row_tokens}) must be from 2 to {BLOCK_TOKENS}.")
    tokenizer = Tokenizer.from_file(cfg.tokenizer, eod=cfg.eod)
    source = read_template(cfg.template, tokenizer)
    template = ChatTemplate(source, tokenizer, name=f"template={cfg.template or 'null'}")
    units = find_units(cfg)
    check_kinds(units, cfg)
    reading = ("format", "max_document_mb", "row_tokens")
    facts = job_facts(
        cfg, units, tokenizer, job="conversations", version=PACKED_VERSION, reading=reading
    )
    facts |= {"chat_template": source, "end_of_turn": template.end_of_turn}
    if not open_dataset_job(Path(cfg.output), facts):
        return
    end = tokenizer.backend.id_to_token(template.end_of_turn)
    logger.info(f"rows of {cfg.row_tokens} tokens; a turn ends with {end}")
    run = partial(pack_unit, cfg=cfg, tokenizer=identity_of(tokenizer), source=source)
    run_dataset_job(cfg, units, tokenizer, run, label="pack")


def read_template(name: str | None, tokenizer: Tokenizer) -> str:
    """The text of a template, ours or from a file.

    Raises:
        ConfigError: there is no such file.
    """
    if name is None:
        name = "chatml" if set(tokenizer.special_names) >= CHATML_TOKENS else "plain"
        logger.info(f"template={name}, by the tokenizer's special tokens")
    own = TEMPLATES / f"{name}.jinja"
    path = own if own.is_file() else Path(name)
    try:
        return read_file(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        ours = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        raise ConfigError(
            f"template={name} cannot be read ({error}). Give a Jinja file, or one of {ours}."
        ) from None


@lru_cache(maxsize=1)
def _load_template(path: str, sha256: str, eod: int, source: str) -> ChatTemplate:
    """The template of this process, checked once."""
    tokenizer = Tokenizer.from_file(path, eod=eod)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path} was changed while the job ran.")
    return ChatTemplate(source, tokenizer)


def pack_unit(
    unit: Unit, *, cfg: ConversationConfig, tokenizer: TokenizerIdentity, source: str
) -> dict[str, Any]:
    """Write a unit's parts; its marker: parts and bytes by split, dialogues, rejects by reason."""
    output = Path(cfg.output)
    template = _load_template(cfg.tokenizer, tokenizer.sha256, tokenizer.eod, source)
    rejects, counts = Rejects(cfg.on_error), Counter[str]()
    layout = ShardLayout(token_dtype(tokenizer.vocab_size), cfg.row_tokens)
    with UnitWriter(
        dataset_writer.parts_folder(output),
        number=unit.number,
        source=unit.source,
        layout=layout,
        fraction=cfg.validation_fraction,
    ) as writer:
        packers = {
            name: RowPacker(layout, eod=tokenizer.eod, write=partial(writer.add, name))
            for name in SPLITS
        }
        for talk in read_talks(unit, cfg, rejects):
            try:
                encoded = template.encode(talk.messages, tools=talk.tools)
                if len(encoded.ids) > cfg.row_tokens:
                    detail = f"{len(encoded.ids)} tokens, row_tokens={cfg.row_tokens}"
                    raise Rejected("too_long", detail)
            except Rejected as error:
                rejects.add(error.reason, talk.path, error.detail, **talk.place)
                continue
            except RecursionError:
                rejects.add("template_error", talk.path, "it is nested too deeply", **talk.place)
                continue
            text, ids, loss = encoded
            digest = digest_text(text) if cfg.validation_fraction else 0
            split = writer.split_of(digest, talk.id, partial(text_bytes, text))
            packers[split].add(Dialogue(ids, loss, talk.id, text_bytes(text)))
            counts[split] += 1
        for packer in packers.values():
            packer.close()
        result = writer.close()
    for key, split in (("nearest", "train"), ("held", "validation")):
        if lowest := result[key]:  # held_out.py looks for them where they were written
            places = packers[split].places
            lowest["documents"] = [places[n] for n in lowest["documents"]]
    return result | {
        "dialogues": {split: counts[split] for split in result["splits"]},
        "rejects": record_rejects(output, unit, rejects),
    }
