"""Start from weights that exist: another run's, or a Hugging Face folder's, at any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint import restore
from pipeline.checkpoint.adapters import Base, base_of, find_base, recorded_base
from pipeline.checkpoint.agreement import Agreement
from pipeline.checkpoint.record import read_record
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.operation import CheckpointConfig
from pipeline.config.parameter_names import is_lora
from pipeline.config.upcycling import dense_model, dense_name
from pipeline.engine.weights import Weights
from pipeline.errors import CheckpointError
from pipeline.huggingface.peft_reader import PeftMatrices
from pipeline.huggingface.reader import HuggingFaceWeights
from pipeline.huggingface.tower import Tower
from pipeline.huggingface.whole_model import open_model
from pipeline.log import logger
from pipeline.model.fragments import Fragment, chunks_of

if TYPE_CHECKING:
    from torch import Tensor


def begin(
    weights: Weights, cfg: CheckpointConfig, finetune: FinetuneConfig, *, base: Base | None
) -> None:
    """The first weights of a run that resumes nothing. Collective: call on every rank.

    Args:
        base: the frozen weights, where they were loaded already.

    Raises:
        CheckpointError: a folder is missing or damaged, or does not fit.
    """
    if cfg.init_adapter:
        assert cfg.init_from, "checkpoint.init_adapter without init_from is refused"
        base = base or load_base(weights, Path(cfg.init_from))
        load_adapter(weights, Path(cfg.init_adapter), finetune, base=base)
    elif cfg.init_from and base is None:
        load_weights(weights, Path(cfg.init_from), upcycle=cfg.upcycle)
    elif cfg.init_tower:
        load_tower(weights, Path(cfg.init_tower))


def load_weights(weights: Weights, path: Path, *, upcycle: bool = False) -> Path:
    """Start from the weights of a run, a checkpoint or a Hugging Face folder; the folder read.

    Collective: call on every rank.

    Args:
        upcycle: they are dense, and each expert is a copy of their MLP.

    Raises:
        CheckpointError: the folder is neither, is damaged, or its model is not this one.
    """
    ranks = Agreement(weights.layout.host_group)
    sources: restore.Sources = dense_name if upcycle else str
    if (path / "config.json").is_file():
        ranks.agree(lambda: import_weights(weights, path, sources))
    else:
        path = ranks.on_main(lambda: folders.find(path))
        if problems := ranks.damage(path):
            raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}.")
        known = _known_bases(path, ranks)
        ranks.agree(
            lambda: restore.read_weights(
                weights, open_model(path, identify=known.__getitem__), sources
            )
        )
    weights.publish_weights()
    return path


def load_tower(weights: Weights, folder: Path) -> None:
    """Start the picture encoder as a SigLIP folder has it; its projector and the GPT stay drawn.

    Collective: call on every rank.

    Raises:
        CheckpointError: the folder is none, or of other sizes.
    """
    ranks = Agreement(weights.layout.host_group)
    ranks.agree(lambda: import_tower(weights, folder))
    weights.publish_weights()


def import_tower(weights: Weights, folder: Path) -> None:
    """Fill this rank's part of the encoder, one whole parameter at a time."""
    tower = Tower(folder)
    tower.check(weights.model)
    tensors = tower.tensors(weights.model)
    for fragment in weights.fragments():
        if fragment.name in tensors:
            _fill(fragment, tensors[fragment.name]())


def load_base(weights: Weights, path: Path) -> Base:
    """Start beside weights that stay as they are; what they are. Collective."""
    return base_of(load_weights(weights, path), Agreement(weights.layout.host_group))


def load_adapter(weights: Weights, folder: Path, finetune: FinetuneConfig, *, base: Base) -> None:
    """Start the low-rank matrices as a folder of peft has them. Collective: call on every rank.

    Args:
        base: what they will stand beside.

    Raises:
        CheckpointError: the folder does not fit the settings, or belongs to another base.
    """
    ranks = Agreement(weights.layout.host_group)
    matrices = ranks.agree(lambda: PeftMatrices(folder, weights.model, finetune))
    there = Path(matrices.base) if matrices.base else None
    # A disk of one node may have it, and reading it together is for all or none.
    is_here = there is not None and (there / "config.json").is_file()
    if there is not None and all(ranks.gather(is_here)):
        if there.resolve() != Path(base.path).resolve():
            base_of(there, ranks).check(base)
    elif weights.layout.ranks.is_main:
        logger.warning(
            "the base of %s is %s, no folder of every node: nobody can tell whether %s is the same",
            folder, matrices.base, base.path,
        )  # fmt: skip
    ranks.agree(lambda: import_matrices(weights, matrices))
    weights.publish_weights()


def import_matrices(weights: Weights, matrices: PeftMatrices) -> None:
    """Fill this rank's low-rank matrices; those beyond the folder's rank stay as they were drawn.

    They add nothing: B, of which they are the other columns, is 0 there.
    """
    stems = set(matrices.stems)
    for fragment in weights.fragments():
        stem, _, kind = fragment.name.rpartition(".")
        if stem not in stems or not is_lora(fragment.name):
            continue
        whole = matrices.pair(stem)[kind == "lora_b"]
        for chunk in chunks_of(fragment, ["weight"]):
            sizes = zip(chunk.offsets, chunk.data.shape, strict=True)
            part = whole[tuple(slice(o, o + n) for o, n in sizes)]
            chunk.data[tuple(map(slice, part.shape))].copy_(part)


def _known_bases(path: Path, ranks: Agreement) -> dict[Path, Base]:
    """The identity of an adapter's base, and of that one's, ...; the ranks share the reading."""
    known: dict[Path, Base] = {}
    while not (path / "config.json").is_file():
        wanted = ranks.on_main(partial(_recorded_base, path))
        if wanted is None:
            break
        path = ranks.on_main(partial(find_base, wanted))
        if (path / folders.SUMS).is_file() and (problems := ranks.damage(path)):
            raise CheckpointError(f"the base {path} is damaged: {'; '.join(problems)}.")
        known[path] = base_of(path, ranks)
        wanted.check(known[path])  # else bases might name each other without end
    return known


def _recorded_base(checkpoint: Path) -> Base | None:
    return recorded_base(read_record(checkpoint))


def import_weights(weights: Weights, folder: Path, sources: restore.Sources = str) -> None:
    """Fill this rank's weights from a Hugging Face folder, one whole parameter at a time."""
    theirs = weights.model if sources is str else dense_model(weights.model)
    source = HuggingFaceWeights(folder, theirs)
    for fragment in weights.fragments():
        name = None if is_lora(fragment.name) else sources(fragment.name)
        if name is None:
            continue
        _fill(fragment, source.tensor(name, fragment.partition.global_shape))


def _fill(fragment: Fragment, whole: Tensor) -> None:
    """This rank's part of a whole parameter."""
    for chunk in chunks_of(fragment, ["weight"]):
        sizes = zip(chunk.offsets, chunk.data.shape, strict=True)
        chunk.data.copy_(whole[tuple(slice(o, o + n) for o, n in sizes)])
