"""Dialogues to packed rows: one unit's way from messages to parts.

Talk --template, tokenizer--> ids, loss --hash--> split --first fit--> rows -> UnitWriter
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from data_prep.sources.dialogues import Talk, TalkConfig, check_kinds, read_talks
from data_prep.sources.inputs import Unit, find_units
from data_prep.sources.pictures import (
    PictureConfig,
    check_pictures_config,
    decoder_version,
    folder_of,
    load_picture,
)
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
from data_prep.tokens.split import SPLITS, UnitWriter, check_fraction, digest_pixels, digest_text
from pipeline.data.chat import ChatTemplate, Rejected
from pipeline.data.picture_files import BadPicture
from pipeline.data.pictures import spread
from pipeline.data.shard_format import (
    BLOCK_TOKENS,
    PACKED_VERSION,
    PICTURES_VERSION,
    Pictures,
    ShardLayout,
    TokenizerIdentity,
    token_dtype,
)
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError, DataError
from pipeline.files import read_file
from pipeline.log import logger

TEMPLATES = Path(__file__).resolve().parents[1] / "chat"
IMAGE_TOKEN = PictureConfig.image_token
CHATML_TOKENS = {"<|im_start|>", "<|im_end|>"}


@dataclass
class ConversationConfig(DatasetJobConfig, TalkConfig):
    """Settings of data_prep.conversations."""

    row_tokens: int = MISSING
    """Tokens of a packed row; training.seq_len must be the same."""
    template: str | None = None
    """Jinja file, or one of our own: chatml, plain, chatml-pictures, plain-pictures; null: chatml
    where the tokenizer has its tokens, else plain; with image_size the one for pictures.
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
    pictures = _pictures_of(cfg, tokenizer)
    source = read_template(cfg.template, tokenizer, image_token=cfg.image_token if pictures else "")
    template = ChatTemplate(source, tokenizer, name=f"template={cfg.template or 'null'}")
    if pictures is not None:
        check_shows_pictures(template, pictures)
    units = find_units(cfg)
    check_kinds(units, cfg)
    reading: tuple[str, ...] = ("format", "max_document_mb", "row_tokens")
    version = PACKED_VERSION if pictures is None else PICTURES_VERSION
    if pictures is not None:
        reading += ("image_root", "image_urls", "max_image_mb", "max_image_megapixels")
    facts = job_facts(cfg, units, tokenizer, job="conversations", version=version, reading=reading)
    facts |= {"chat_template": source, "end_of_turn": template.end_of_turn}
    if pictures is not None:
        facts |= asdict(pictures) | {"decoder": decoder_version()}
    if not open_dataset_job(Path(cfg.output), facts):
        return
    end = tokenizer.backend.id_to_token(template.end_of_turn)
    logger.info(f"rows of {cfg.row_tokens} tokens; a turn ends with {end}")
    run = partial(
        pack_unit, cfg=cfg, tokenizer=identity_of(tokenizer), source=source, pictures=pictures
    )
    run_dataset_job(cfg, units, tokenizer, run, label="pack")


def _pictures_of(cfg: ConversationConfig, tokenizer: Tokenizer) -> Pictures | None:
    """How pictures will stand in the rows; None: there are none.

    Raises:
        ConfigError: settings contradict each other, or the tokenizer has no such token.
    """
    if cfg.image_size is None:
        return None
    check_pictures_config(cfg, cfg.row_tokens)
    token = tokenizer.backend.token_to_id(cfg.image_token)
    if token is None or cfg.image_token not in tokenizer.special_names:
        names = ", ".join(sorted(tokenizer.special_names)[:8])
        raise ConfigError(
            f"image_token={cfg.image_token} is no special token of {cfg.tokenizer}; there are "
            f"{names}. Tokenizers of data_prep.train_tokenizer have <|image|>."
        )
    if token in (0, tokenizer.eod):  # 0: of samples that data.on_corrupt=skip leaves out
        raise ConfigError(
            f"image_token={cfg.image_token} has the id {token}, with which rows are filled up "
            f"(0, and {tokenizer.eod}, which ends documents). Name another special token."
        )
    return Pictures(cfg.image_size, cfg.patch_size, token)


def check_shows_pictures(template: ChatTemplate, pictures: Pictures) -> None:
    """Raise ConfigError unless a template makes one placeholder of a picture, and keeps words."""
    shown: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    try:
        found = template.encode([{"role": "user", "content": shown}, answer])
        count = int((found.ids == pictures.image_token_id).sum())
        words = all(word in found.text for word in ("What is it?", "A cat."))
        problem = "" if count == 1 and words else f"{found.text[:200]!r}"
    except Rejected as error:
        problem = f"{error.reason}: {error.detail}"
    if problem:
        raise ConfigError(
            f"{template.name} does not render a content that is a list of a picture and a text: "
            f"{problem}. It must write the image_token once for each item of type image; "
            "data_prep/chat/chatml-pictures.jinja does."
        )


def read_template(name: str | None, tokenizer: Tokenizer, *, image_token: str = "") -> str:
    """The text of a template, ours or from a file; ours with `image_token` for a picture.

    Raises:
        ConfigError: there is no such file.
    """
    if name is None:
        name = "chatml" if set(tokenizer.special_names) >= CHATML_TOKENS else "plain"
        name += "-pictures" * bool(image_token)
        logger.info(f"template={name}, by the tokenizer's special tokens")
    own = TEMPLATES / f"{name}.jinja"
    path = own if own.is_file() else Path(name)
    try:
        text = read_file(path).decode()
        is_ours = path is own and image_token
        return text.replace(IMAGE_TOKEN, image_token) if is_ours else text
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
    unit: Unit,
    *,
    cfg: ConversationConfig,
    tokenizer: TokenizerIdentity,
    source: str,
    pictures: Pictures | None = None,
) -> dict[str, Any]:
    """Write a unit's parts; its marker: parts and bytes by split, dialogues, rejects by reason."""
    output = Path(cfg.output)
    template = _load_template(cfg.tokenizer, tokenizer.sha256, tokenizer.eod, source)
    rejects, counts = Rejects(cfg.on_error), Counter[str]()
    layout = ShardLayout(token_dtype(tokenizer.vocab_size), cfg.row_tokens, pictures)
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
                text, dialogue = _encode(talk, template, cfg, pictures)
            except (Rejected, BadPicture) as error:
                rejects.add(error.reason, talk.path, error.detail, **talk.place)
                continue
            except RecursionError:
                rejects.add("template_error", talk.path, "it is nested too deeply", **talk.place)
                continue
            digest = _digest(text, dialogue) if cfg.validation_fraction else 0
            split = writer.split_of(digest, talk.id, partial(text_bytes, text))
            packers[split].add(dialogue)
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


def _encode(
    talk: Talk, template: ChatTemplate, cfg: ConversationConfig, pictures: Pictures | None
) -> tuple[str, Dialogue]:
    """(text, ids with their pictures) of a dialogue.

    Raises:
        Rejected, BadPicture: it cannot be learned from.
    """
    text, ids, loss = template.encode(talk.messages, tools=talk.tools)
    if pictures is not None:
        if (count := int((ids == pictures.image_token_id).sum())) != len(talk.images):
            detail = f"it shows {count} of {len(talk.images)} pictures"
            raise Rejected("template_error", detail)
        ids, loss = spread(ids, loss, pictures)
        text = text.replace(cfg.image_token, "")  # a picture is not counted as text
        if not loss.any():
            raise Rejected("nothing_learned")
    if len(ids) > cfg.row_tokens:
        raise Rejected("too_long", f"{len(ids)} tokens, row_tokens={cfg.row_tokens}")
    images = None
    if talk.images:
        folder = folder_of(talk.path)
        images = np.stack([load_picture(source, folder, cfg) for source in talk.images])
    return text, Dialogue(ids, loss, talk.id, text_bytes(text), images)


def _digest(text: str, dialogue: Dialogue) -> int:
    """What decides where a dialogue goes: its first picture, if it shows any, else its text."""
    return digest_text(text) if dialogue.images is None else digest_pixels(dialogue.images[0])
