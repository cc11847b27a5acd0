"""Turn a checkpoint into a Hugging Face folder that loads without remote code.

    python -m pipeline.export runs/NAME FOLDER [dtype=bf16] [adapter=true]

    checkpoint --one parameter at a time--> model-00001-of-00003.safetensors ..., config.json,
                                            tokenizer, README.md
    FOLDER --transformers--> logits on fixed tokens == our own forward pass, or the export fails

GPT-2 models become GPT2LMHeadModel, modern ones LlamaForCausalLM or Qwen3ForCausalLM (q/k-norm),
mixtures of experts MixtralForCausalLM or Qwen3MoeForCausalLM. Memory: one parameter, and for the
check the model twice.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pipeline import cli, log
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import find_base, recorded_base
from pipeline.checkpoint.record import read_record
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.files import check_writable
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.peft import adapter_difference, check_is_adapter, export_adapter
from pipeline.huggingface.writer import TOLERANCE, DType, export, logits_difference
from pipeline.tracking.afterwards import run_of


@dataclass
class ExportConfig:
    """Export a checkpoint."""

    checkpoint: str = "???"
    """A run folder (its newest checkpoint) or one checkpoint."""
    output: str = "???"
    """Folder to write; must be new or empty."""
    dtype: DType = DType.bf16
    """Type of the written weights; the checkpoint has fp32."""
    adapter: bool = False
    """Of a LoRA run, write the low-rank matrices only, as a folder that peft loads; false: merged
    with the base, in fp32, then rounded.
    """
    track: bool = False
    """Also hand the folder to the trackers of the checkpoint's run: in W&B a model artifact."""
    base: str | None = None
    """Where the base of a LoRA run is now; null: where it was when it was trained."""
    check: bool = True
    """Compare logits with our own forward pass; false for models that do not fit into memory
    twice.
    """


def main(cfg: ExportConfig) -> int:
    """Write the folder, then prove it."""
    log.setup()
    checkpoint, output = folders.find(Path(cfg.checkpoint)), Path(cfg.output)
    folders.check_new(output)
    check_writable(output / "config.json", "output=")
    run = run_of(Path(cfg.checkpoint)) if cfg.track else None
    library = "peft" if cfg.adapter else "transformers"
    if cfg.check and importlib.util.find_spec(library) is None:
        raise ConfigError(
            f'the check needs {library}, which is not installed: pip install -e ".[hf]", or leave '
            "the check out with check=false."
        )
    _check(cfg, checkpoint)  # before every byte of the checkpoint is read
    if problems := folders.damage(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is damaged: {'; '.join(problems)}. Export another one."
        )
    base = Path(cfg.base) if cfg.base else None
    if cfg.adapter:
        export_adapter(checkpoint, output, dtype=cfg.dtype, base=base)
    else:
        export(checkpoint, output, dtype=cfg.dtype, base=base)
    if cfg.check:
        _compare(cfg, checkpoint, output, base=base)
    else:
        print(f"{output}: written, NOT CHECKED (check=false)")
    if run is not None:
        facts = {"dtype": cfg.dtype.name, "adapter": cfg.adapter, "checked": cfg.check}
        run.tell(lambda tracker, at: tracker.keep_model(at, output, facts))
        print(f"{output}: told {', '.join(tracker.name for tracker in run.trackers)}")
    return 0


def _compare(cfg: ExportConfig, checkpoint: Path, output: Path, *, base: Path | None) -> None:
    """Compare the exported model's logits with ours, and say how much they differ.

    Raises:
        CheckpointError: by too much; the folder is left so that nothing loads it, also where it
            could not be compared.
    """
    library = "peft" if cfg.adapter else "transformers"
    file, moved = "adapter_config.json" if cfg.adapter else "config.json", 0.0
    try:
        if cfg.adapter:
            difference, moved = adapter_difference(checkpoint, output, dtype=cfg.dtype)
        else:
            difference = logits_difference(checkpoint, output, dtype=cfg.dtype, base=base)
    except Exception as error:  # a library refuses what is wrong with errors of many kinds
        (output / file).rename(output / f"{file}.failed")
        if isinstance(error, PipelineError):
            raise
        raise CheckpointError(
            f"{library} could not compute what was exported ({type(error).__name__}: {error}). "
            f"{output} was left without its {file}; check=false exports without this check."
        ) from error
    if not difference <= TOLERANCE:
        (output / file).rename(output / f"{file}.failed")
        raise CheckpointError(
            f"the exported model's logits differ from ours by {difference:.3g}, more than "
            f"{TOLERANCE:g}: the export is wrong. {output} was left without its {file}."
        )
    print(f"{output}: written; logits of {library} and ours differ by {difference:.1e}")
    if cfg.adapter:
        print(f"{output}: the adapter changes the logits of its base by up to {moved:.2e}")


def _check(cfg: ExportConfig, checkpoint: Path) -> None:
    """Raise where the checkpoint's record says that it cannot be exported so."""
    record = read_record(checkpoint)
    mapping_for(record.model())
    wanted = recorded_base(record)
    if wanted is None and cfg.base is not None:
        raise ConfigError(
            f"base={cfg.base} has no effect: {checkpoint} holds a whole model. Leave it out."
        )
    if cfg.adapter:
        check_is_adapter(checkpoint)
    if wanted is not None:
        find_base(wanted, Path(cfg.base) if cfg.base else None)


if __name__ == "__main__":
    cli.run(main, ExportConfig, config="export", positional=("checkpoint", "output"))
