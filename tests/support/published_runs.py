"""Published training throughput, with what the plan's formula makes of it.

    published_runs() --> PublishedRun --predicted--> the published number as step_time.py has it
    python -m tests.support.published_runs > docs/plan-rows.md      the table, after a change of the formula

Rows marked `fitted` were looked at when a constant of the formula or of conf/devices/ was chosen;
the others were not. Layouts that a source leaves open are marked in its comment.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.config.choices import Activation, Normalization, Position, Recompute
from pipeline.config.model import ModelConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.config.training import ParallelConfig, ScheduleConfig, TrainingConfig
from pipeline.planning.devices import load_device
from pipeline.planning.flops import flops_per_token, num_parameters
from pipeline.planning.job import Job
from pipeline.planning.step_time import Practice, step_time

FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/8c8dd48f72168c5d51e2f7b151595892a8fba43d/scripts/train/benchmarking/README.md"
TITAN = "https://github.com/pytorch/torchtitan/blob/31a17bfdb70bab6f62a13d21816a5339b911d6e3/benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = (
    "https://github.com/will-thompson-k/torchtitan/blob/main/docs/performance.md (torchtitan, 2024)"
)
SC21, MLSYS23 = "arXiv:2104.04473, table 1", "arXiv:2205.05198, table 5"
LLAMA3 = "arXiv:2407.21783, table 4"


@dataclass(frozen=True)
class PublishedRun:
    """One row of a published table."""

    source: str
    name: str
    device: str
    world_size: int
    layers: int
    hidden: int
    heads: int
    batch: int
    micro: int
    published: float
    unit: str
    """tokens/s (of a device), s (a step), TFLOP/s (of a device, recomputed work counted) or MFU."""
    fitted: bool
    seq_len: int = 2048
    vocab: int = 51200
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    zero: int = 1
    recompute: Recompute = Recompute.none
    groups: int | None = None
    ffn: int | None = None
    is_llama: bool = False
    practice: Practice = field(default_factory=Practice)

    def job(self) -> Job:
        """What the plan would be asked."""
        llama = {
            "position": Position.rope,
            "normalization": Normalization.rmsnorm,
            "activation": Activation.swiglu,
            "bias": False,
            "tied_embeddings": False,
        }
        model = ModelConfig(
            name="x",
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            max_seq_len=self.seq_len,
            num_query_groups=self.groups,
            ffn_hidden_size=self.ffn,
            **(llama if self.is_llama else {}),
        )
        cfg = PretrainConfig(
            name="x",
            model=model,
            parallel=ParallelConfig(
                tensor_parallel_size=self.tensor,
                pipeline_parallel_size=self.pipeline,
                sequence_parallel=self.sequence_parallel,
                zero_stage=self.zero,
            ),
            training=TrainingConfig(
                total_steps=100,
                global_batch_size=self.batch,
                micro_batch_size=self.micro,
                recompute=self.recompute,
            ),
            schedule=ScheduleConfig(min_lr=0.0),
        )
        return Job.of(cfg, derive(cfg, world_size=self.world_size, tokenizer_vocab_size=self.vocab))

    def predicted(self) -> float:
        """The published number, by the formula."""
        job, device = self.job(), load_device(self.device)
        practice = replace(self.practice, gradient_first=False)  # nobody else's are
        seconds = step_time(job, device, practice).total
        per_device = job.shape.at(0).tokens / seconds / self.world_size
        flops = flops_per_token(
            job.model, job.finetune, vocab_size=job.shape.vocab_size, seq_len=self.seq_len
        )
        mfu = per_device * flops / device.peak
        return {
            "tokens/s": per_device,
            "s": seconds,
            "MFU": mfu,
            # 96 B s l h^2 (1 + ...), which counts the forward pass a second time.
            "TFLOP/s": mfu * device.peak / 1e12 * 4 / 3,
        }[self.unit]

    @property
    def speed_error(self) -> float:
        """How much faster the formula is than the run: 0.1 is 10 % too fast."""
        ratio = self.predicted() / self.published
        return (1 / ratio if self.unit == "s" else ratio) - 1

    @property
    def parameters(self) -> int:
        """Of the model."""
        return num_parameters(self.job().model, self.vocab)


def published_runs() -> Iterator[PublishedRun]:
    """All of them."""
    yield from _megatron_2021()
    yield from _megatron_2022()
    yield from _llm_foundry()
    yield from _llama_3()


def _megatron_2021() -> Iterator[PublishedRun]:
    """Full recompute, attention not fused, fp16, not interleaved; micro-batches are our guess."""
    for heads, hidden, layers, tensor, pipeline, devices, batch, tflops in [
        (24, 2304, 24, 1, 1, 32, 512, 137), (32, 3072, 30, 2, 1, 64, 512, 138),
        (32, 4096, 36, 4, 1, 128, 512, 142), (48, 6144, 40, 8, 1, 256, 1024, 135),
        (64, 8192, 48, 8, 2, 512, 1536, 138), (80, 10240, 60, 8, 4, 1024, 1792, 140),
        (96, 12288, 80, 8, 8, 1536, 2304, 148), (128, 16384, 96, 8, 16, 1920, 2160, 155),
        (128, 20480, 105, 8, 35, 2520, 2520, 163), (160, 25600, 128, 8, 64, 3072, 3072, 163),
    ]:  # fmt: skip
        data = devices // tensor // pipeline
        micro = 1 if pipeline > 1 else 4 if devices > 128 else 8 if devices > 32 else 16
        yield PublishedRun(
            SC21, f"{layers} x {hidden}", "a100", devices, layers, hidden, heads, batch,
            min(micro, batch // data), tflops, "TFLOP/s", True, tensor=tensor, pipeline=pipeline,
            recompute=Recompute.full, practice=Practice(fused_attention=False),
        )  # fmt: skip


def _megatron_2022() -> Iterator[PublishedRun]:
    """Selective recompute with sequence parallelism, and full without; one copy of the model."""
    for heads, hidden, layers, pipeline, batch, micro, full, selective, chunks in [
        (64, 6144, 48, 1, 4, 4, 1.42, 1.10, 1), (96, 12288, 96, 8, 64, 1, 18.13, 13.75, 3),
        (128, 20480, 105, 35, 280, 1, 49.05, 37.83, 3),
        (160, 25600, 128, 64, 512, 1, 94.42, 71.49, 1),
    ]:  # fmt: skip
        for recompute, seconds in ((Recompute.full, full), (Recompute.selective, selective)):
            yield PublishedRun(
                MLSYS23, f"{layers} x {hidden} {recompute.name}", "a100", 8 * pipeline, layers,
                hidden, heads, batch, micro, seconds, "s", True, tensor=8, pipeline=pipeline,
                sequence_parallel=recompute is Recompute.selective, recompute=recompute,
                practice=Practice(chunks_per_stage=chunks, fused_attention=False),
            )  # fmt: skip


# layers, hidden size, heads
MPT = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 12), "1b": (24, 2048, 16),
    "3b": (32, 2560, 20), "7b": (32, 4096, 32), "13b": (40, 5120, 40), "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}  # fmt: skip


def _llm_foundry() -> Iterator[PublishedRun]:
    """Every bf16 row of its page: FSDP, flash attention, 200 Gb/s a device between nodes."""
    with (Path(__file__).parent / "published_runs.csv").open() as file:
        for row in csv.DictReader(file):
            layers, hidden, heads = MPT[row["model"]]
            devices, micro = int(row["devices"]), int(row["micro_batch_size"])
            rate = int(row["tokens_per_s_per_device"])
            # 1b and 7b on one node gave the devices' shares; several nodes, how a ring uses links.
            is_one_node = devices == 8 and row["model"] in ("1b", "7b")
            is_fitted = is_one_node or 8 < devices <= 64
            yield PublishedRun(
                FOUNDRY, f"MPT {row['model']}", row["device"], devices, layers, hidden, heads,
                devices * micro * int(row["accumulation"]), micro, rate, "tokens/s",
                is_fitted and row["device"] != "a100-40g",
                seq_len=int(row["seq_len"]), vocab=50368, zero=3,
                recompute=Recompute.full if row["recomputed"] == "1" else Recompute.none,
            )  # fmt: skip


def _llama_3() -> Iterator[PublishedRun]:
    """Llama 3 by Meta, and by torchtitan: FSDP, recomputing every second block or all of them.

    torchtitan's H100 have 2.4 TB/s of memory and run at 500 W: slower devices than conf/'s.
    """
    eight = {"layers": 32, "hidden": 4096, "heads": 32, "groups": 8, "ffn": 14336}
    seventy = {"layers": 80, "hidden": 8192, "heads": 64, "groups": 8, "ffn": 28672}
    common = {"seq_len": 8192, "vocab": 128256, "zero": 3, "is_llama": True, "unit": "tokens/s"}
    half = {"recompute": Recompute.selective}
    for devices, compiled, rate, fitted in [
        (8, False, 5762, False), (8, True, 6667, True), (128, False, 5605, False),
        (128, True, 6514, False),
    ]:  # fmt: skip
        name = f"Llama 3.1 8B{' compiled' if compiled else ''}"
        yield PublishedRun(
            source=TITAN, name=name, device="h100", world_size=devices, batch=2 * devices, micro=2,
            published=rate, fitted=fitted, **common, **eight, **half,
        )  # fmt: skip
    for name, sizes, rate, again in [
        ("Llama 3 8B", eight, 2904, half), ("Llama 3 70B", seventy, 331, {"recompute": Recompute.full}),
    ]:  # fmt: skip
        yield PublishedRun(
            source=TITAN_A100, name=name, device="a100", world_size=64, batch=64, micro=1,
            published=rate, fitted=False, **common, **sizes, **again,
        )  # fmt: skip
    yield PublishedRun(
        source=LLAMA3, name="Llama 3 405B", device="h100", world_size=8192, layers=126,
        hidden=16384, heads=128, groups=8, ffn=53248, batch=2048, micro=1, published=0.43,
        unit="MFU", fitted=True, seq_len=8192, vocab=128256, tensor=8, pipeline=16,
        sequence_parallel=True, is_llama=True, practice=Practice(chunks_per_stage=4),
    )  # fmt: skip


# ---- the tables of docs/ -------------------------------------------------------------------------

HEAD = """# Published runs and the plan's formula, row by row

Every row that `tests/support/published_runs.py` has; a test keeps this table and the formula together. Errors are of speed:
+10 % means that the formula is 10 % faster than the run was. **fitted**: a constant was chosen with this row in sight;
**held out**: none was. [The plan](plan.md) has the summary and the sources' addresses.

Layout is devices = data x pipeline x tensor parallel. Units: tokens/s of a device, s a step, TFLOP/s of a device with
recomputed work counted, MFU.

| source | run | device | layout | sequence | micro-batch | recompute | | published | formula | error |
|---|---|---|---|---|---|---|---|---|---|---|
"""
SHORT = {
    FOUNDRY: "llm-foundry", TITAN: "torchtitan", TITAN_A100: "torchtitan", SC21: SC21,
    MLSYS23: MLSYS23, LLAMA3: LLAMA3,
}  # fmt: skip


def rows_page() -> str:
    """docs/plan-rows.md, as it must be."""
    return HEAD + "\n".join(_row(run) for run in published_runs()) + "\n"


def _row(run: PublishedRun) -> str:
    layout = f"{run.world_size} = {run.world_size // run.tensor // run.pipeline} x {run.pipeline} x {run.tensor}"
    return (
        f"| {SHORT[run.source]} | {run.name} | {run.device} | {layout} | {run.seq_len:,} | {run.micro} | "
        f"{run.recompute.name} | {'fitted' if run.fitted else 'held out'} | "
        f"{run.published:,.5g} {run.unit} | {run.predicted():,.3g} | {run.speed_error:+.0%} |"
    )


def summary_rows() -> list[str]:
    """The table of docs/plan.md, as it must be."""
    groups: dict[tuple[str, str, bool], list[float]] = {}
    for run in published_runs():
        key = (SHORT[run.source], run.device, run.fitted)
        groups.setdefault(key, []).append(run.speed_error)
    return [
        f"| {source} | {device} | {'fitted' if fitted else '**held out**'} | {len(errors)} | "
        f"{statistics.median(errors):+.0%} | {min(errors):+.0%} to {max(errors):+.0%} |"
        for (source, device, fitted), errors in groups.items()
    ]


if __name__ == "__main__":
    print(rows_page(), end="")
