"""What goes on inside a model: lens, heads, norms, attribution, ablation, patching; at any layout.

    python -m pipeline.probe runs/NAME                              on the run's held-out data
    python -m pipeline.probe runs/NAME prompt='The cat sat on the'  on a text
    python -m pipeline.probe runs/NAME prompt='A B A' patch_into='A C A' answer=' B'
    torchrun --nproc-per-node 4 -m pipeline.probe runs/NAME parallel.tensor_parallel_size=4

Writes probe.json and index.html, a page that needs no other file, and prints a summary. Hugging
Face folders are probed too: checkpoint=FOLDER. What the numbers mean: docs/probing.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli, log
from pipeline.checkpoint.folder import list_checkpoints
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import Evaluation
from pipeline.errors import ConfigError
from pipeline.files import check_writable
from pipeline.inference.asked_model import (
    CACHE_DIR,
    AskedConfig,
    evaluation_of,
    model_of,
    open_asked_model,
    tokenizer_of,
)
from pipeline.probing.findings import print_summary, write_findings
from pipeline.probing.request import (
    Request,
    check_translators,
    encode_patching,
    encode_prompt,
)

if TYPE_CHECKING:
    from pipeline.data.datasets import DataSummary
    from pipeline.distributed.ranks import Ranks

LENS = "tuned_lens.safetensors"


@dataclass
class ProbeConfig(AskedConfig):
    """Look into a checkpoint."""

    prompt: str | None = None
    """A text to look at, in the place of held-out data; null: these, whose first tokens are shown.
    """
    patch_into: str | None = None
    """Another prompt of as many tokens, into whose run what passed by for `prompt` is put."""
    answer: str | None = None
    """What is asked for after both prompts: the first token of this text; with patch_into."""
    ablate: bool = False
    """Also the loss without each head, attention layer and MLP: for each of them the text is read
    once more.
    """
    curve: bool = False
    """Also lens losses and head scores of every checkpoint of a run, by step; which are there is
    checkpoint.keep_last and checkpoint.keep_every of the run.
    """
    train_lens: int = 0
    """Steps that a tuned lens is trained on held-out sequences behind those that are measured, and
    written to tuned_lens.safetensors beside the findings; 250 are usual, 0: none is trained.
    """
    tuned_lens: str | None = None
    """A tuned lens that train_lens wrote, to read the blocks with; null: none."""
    output: str | None = None
    """Folder of the results; null: probe/ in the folder of the run, checkpoint or model."""
    sequences: int = 32
    """Held-out sequences per dataset that the means are taken over; 0: all of them."""


def main(cfg: ProbeConfig) -> int:
    """Look, write, print."""
    from pipeline.distributed.layout import disconnect
    from pipeline.distributed.ranks import ranks_from_environment

    ranks = ranks_from_environment()
    log.setup(global_rank=ranks.global_rank)
    check_writable(_output(cfg) / "probe.json", "output=")  # what is found takes long to find
    findings = look_into(cfg, ranks)
    if ranks.is_main:
        written = write_findings(findings, _output(cfg))
        print_summary(findings)
        print("\n".join(f"{name:<12}{file}" for name, file in written.items()))
    disconnect()
    return 0


def look_into(cfg: ProbeConfig, ranks: Ranks) -> dict[str, Any]:
    """Build the model on this layout, load the weights, look. Collective: call on every rank."""
    from pipeline.config.run_shape import derive_evaluation

    path, request, data = _request(cfg)
    shape = derive_evaluation(
        request.evaluation,
        world_size=ranks.world_size,
        tokenizer_vocab_size=request.tokenizer.vocab_size if data is None else data.vocab_size,
        row_tokens=None if data is None else data.row_tokens,
    )

    from pipeline.distributed.layout import connect  # from here on torch is needed

    layout = connect(ranks, shape.sizes)
    from pipeline.checkpoint.agreement import Agreement
    from pipeline.probing.probe import probe
    from pipeline.training.initial_weights import load_weights

    model, path = open_asked_model(request.evaluation, shape, layout, path=path)
    earlier = []
    if cfg.curve:
        # The main rank's list: a run that goes on saves and prunes while ranks look.
        found = Agreement(layout.host_group).on_main(lambda: _checkpoints(cfg))
        earlier = [(step, partial(load_weights, model, folder)) for step, folder in found]
    return probe(model, request, shape=shape, earlier=earlier) | {"checkpoint": str(path)}


def _request(cfg: ProbeConfig) -> tuple[Path, Request, DataSummary | None]:
    """The folder with the weights; what is asked, its nulls filled; of held-out data their facts.

    Raises:
        ConfigError: settings contradict each other.
    """
    _check(cfg)
    model, path, training, _ = model_of(Path(cfg.checkpoint))
    data = None
    if cfg.prompt is None:
        evaluation, path, data = evaluation_of(cfg)
    else:
        evaluation = Evaluation(
            model, DataConfig(), cfg.parallel, cfg.precision or training.precision, seq_len=0,
            micro_batch_size=cfg.micro_batch_size, sequences=cfg.sequences,
        )  # fmt: skip
    # A compiled block calls no hooks.
    evaluation = replace(evaluation, model=replace(evaluation.model, compile=False))
    request = Request(
        evaluation,
        tokenizer_of(path),
        longest=training.seq_len or model.max_seq_len,
        cache_dir=Path(evaluation.data.cache_dir or CACHE_DIR),
        ablates=cfg.ablate,
    )
    request = _with_lens(request, cfg)
    return path, request if cfg.prompt is None else _with_prompts(request, cfg), data


def _with_lens(request: Request, cfg: ProbeConfig) -> Request:
    """The request with its tuned lens.

    Raises:
        CheckpointError: the file holds none of this model.
        ConfigError: one block has nothing to translate.
    """
    model = request.evaluation.model
    if model.num_layers == 1 and (cfg.train_lens or cfg.tuned_lens):
        raise ConfigError(
            "a tuned lens translates what blocks before the last one say, and model.num_layers "
            "is 1: leave train_lens and tuned_lens out."
        )
    if cfg.train_lens:
        return replace(request, lens=_output(cfg) / LENS, lens_steps=cfg.train_lens)
    if cfg.tuned_lens is None:
        return request
    check_translators(Path(cfg.tuned_lens), model)
    return replace(request, lens=Path(cfg.tuned_lens))


def _output(cfg: ProbeConfig) -> Path:
    """The folder of the results."""
    return Path(cfg.output or Path(cfg.checkpoint) / "probe")


def _checkpoints(cfg: ProbeConfig) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of a run, oldest first.

    Raises:
        ConfigError: the setting names no run.
    """
    for root in (Path(cfg.checkpoint) / "checkpoints", Path(cfg.checkpoint)):
        if found := list_checkpoints(root):
            return found
    raise ConfigError(
        f"curve=true needs a run with its checkpoints, and {cfg.checkpoint} holds none: give the "
        "run's folder, runs/NAME, or leave curve out."
    )


def _check(cfg: ProbeConfig) -> None:
    """Refuse settings that would have no effect beside each other."""
    if cfg.curve:
        _checkpoints(cfg)
    if cfg.prompt is None and (cfg.patch_into is not None or cfg.answer is not None):
        raise ConfigError("patch_into and answer go with a prompt: set prompt='...' too.")
    if cfg.prompt is not None and (cfg.data != DataConfig() or cfg.seq_len is not None):
        raise ConfigError(
            "with a prompt, data.* and seq_len would have no effect: the prompt is all that is "
            "read. Leave them out, or leave prompt out to read held-out data."
        )
    if cfg.train_lens < 0 or (cfg.train_lens and cfg.tuned_lens is not None):
        raise ConfigError(
            f"train_lens ({cfg.train_lens}) is a number of steps, and goes without tuned_lens "
            f"({cfg.tuned_lens}): a lens is trained or read."
        )
    if cfg.train_lens and (cfg.prompt is not None or cfg.sequences == 0):
        raise ConfigError(
            "train_lens reads held-out sequences behind those that are measured: leave prompt out, "
            "and set sequences to less than there are."
        )
    if cfg.micro_batch_size < 1 or cfg.sequences < 0:
        raise ConfigError(
            f"micro_batch_size ({cfg.micro_batch_size}) must be at least 1, sequences "
            f"({cfg.sequences}) at least 0 (all)."
        )
    if (ranks := cfg.parallel.context_parallel_size) != 1:
        raise ConfigError(
            f"parallel.context_parallel_size ({ranks}) must be 1: what a probe looks at are whole "
            "sequences. Share the model by parallel.tensor_parallel_size instead."
        )


def _with_prompts(request: Request, cfg: ProbeConfig) -> Request:
    """The request with its prompts encoded, and sequences as long as they are."""
    assert cfg.prompt is not None
    longest = request.evaluation.model.max_seq_len
    ids = encode_prompt(request.tokenizer, cfg.prompt, longest=longest)
    patching = None
    if cfg.patch_into is not None or cfg.answer is not None:
        patching = encode_patching(
            request.tokenizer, ids, patch_into=cfg.patch_into or "", answer=cfg.answer or "",
            longest=longest,
        )  # fmt: skip
    # Sequence-parallel ranks take equal parts.
    parts = cfg.parallel.tensor_parallel_size if cfg.parallel.sequence_parallel else 1
    evaluation = replace(request.evaluation, seq_len=-(-len(ids) // parts) * parts)
    return replace(request, evaluation=evaluation, prompt=ids, patching=patching)


if __name__ == "__main__":
    cli.run(main, ProbeConfig, config="probe", positional=("checkpoint",))
