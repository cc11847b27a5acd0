"""A step of LoRA, and of frozen layers, against peft and transformers on the same model and device.

    python benchmarks/finetune.py                         every shape and precision, one thread
    python benchmarks/finetune.py --shapes small --precisions fp32 --rounds 5

The model is a Llama of random weights. lora: rank 8 beside every linear of attention and MLP; last-layers: the last two
blocks, the final norm and the head. Ours is pipeline.engine as the trainer calls it. peft is LlamaForCausalLM under peft,
transformers the same class with requires_grad=False on the rest; both with clipping and fused AdamW, in bf16 with the base
in bf16, the adapter in fp32, and autocast. Ours has one A for query, key and value and one for gate and up, peft one for each:
at the small shape ours trains 65,536 numbers, peft 77,824. Each lives in a process of its own with the same threads; rounds
alternate between them, and the ratio is the median over rounds of ours over theirs in the same round. On a CPU the seconds are those of
the process, so that other jobs of the machine count little. Gradients and optimizer state are counted when the optimizer
steps; `full` is ours with everything trained, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

# layers, width, heads, query groups, width of the MLP, sequence, batch, vocabulary
SHAPES = {
    "small": (4, 128, 4, 2, 384, 64, 12, 256),
    "medium": (6, 384, 6, 2, 1024, 256, 8, 8192),
    "large": (12, 768, 12, 4, 2048, 512, 2, 32000),
}
KINDS = {"lora": ("ours", "peft", "full"), "last-layers": ("ours", "transformers", "full")}
RANK, ALPHA = 8, 16.0
LR, BETAS, CLIP = 6e-4, (0.9, 0.95), 1.0
Step = Callable[[], float]


class Sizes:
    """Bytes of gradients and optimizer state, as they are when an optimizer steps."""

    def __init__(self, optimizer: Any, parameters: Iterable[Any]) -> None:
        """Look at each step of the optimizer; `parameters` are those of the model."""
        self.trained = self.gradients = self.state = 0
        self._parameters = list(parameters)
        optimizer.register_step_pre_hook(self._look)
        self._optimizer = optimizer

    def _look(self, *_: Any) -> None:
        stepped = [p for group in self._optimizer.param_groups for p in group["params"]]
        with_gradient = {id(p): p for p in [*stepped, *self._parameters] if p.grad is not None}
        self.trained = sum(p.numel() for p in stepped)
        self.gradients = sum(p.grad.nbytes for p in with_gradient.values())
        values = (v for entry in self._optimizer.state.values() for v in entry.values())
        self.state = sum(v.nbytes for v in values if hasattr(v, "nbytes") and v.dim())


def theirs(contender: str, shape: str, precision: str, tokens: Any) -> tuple[Step, Sizes]:
    """LlamaForCausalLM with a part of it trained, in plain torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads, groups, inner, seq, _, vocab = SHAPES[shape]
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=seq, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.config.use_cache = False
    if contender == "peft":
        import peft

        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")  # fmt: skip
        model = peft.get_peft_model(model, settings)
    else:
        last = (f"model.layers.{layers - 1}.", f"model.layers.{layers - 2}.", "model.norm", "lm_head")  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(last))
    device = tokens.device
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    sizes = Sizes(optimizer, model.parameters())

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, sizes


def ours(kind: str, shape: str, precision: str, tokens: Any) -> tuple[Step, Sizes]:
    """A step of pipeline.engine as the trainer calls it."""
    from types import SimpleNamespace

    from pipeline.config.choices import Activation, Normalization, Position, Precision
    from pipeline.config.finetune import FinetuneConfig
    from pipeline.config.model import ModelConfig
    from pipeline.config.pretrain import PretrainConfig
    from pipeline.config.run_shape import derive
    from pipeline.config.training import OptimizerConfig, TrainingConfig
    from pipeline.distributed.layout import connect
    from pipeline.distributed.ranks import ranks_from_environment
    from pipeline.training.build import build_engine

    layers, width, heads, groups, inner, seq, batch, vocab = SHAPES[shape]
    last = ["layers.-1.*", "layers.-2.*", "final_norm.*", "head.*"]
    finetune = {
        "lora": FinetuneConfig(train=["*.lora_?"], lora_rank=RANK, lora_alpha=ALPHA),
        "last-layers": FinetuneConfig(train=last),
        "full": FinetuneConfig(),
    }[kind]
    cfg = PretrainConfig(
        name="benchmark",
        model=ModelConfig(
            name=shape, num_layers=layers, hidden_size=width, num_attention_heads=heads, num_query_groups=groups,
            ffn_hidden_size=inner, max_seq_len=seq, position=Position.rope, normalization=Normalization.rmsnorm,
            activation=Activation.swiglu, bias=False, tied_embeddings=False,
        ),
        optimizer=OptimizerConfig(lr=LR, weight_decay=0.0, clip_grad=CLIP),
        training=TrainingConfig(
            total_steps=10**6, global_batch_size=batch, micro_batch_size=batch, precision=Precision[precision]
        ),
        finetune=finetune,
    )  # fmt: skip
    run = derive(cfg, world_size=1, tokenizer_vocab_size=vocab)
    engine = build_engine(cfg, run, connect(ranks_from_environment(), run.sizes))
    micro_batch: Any = SimpleNamespace(
        tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous(), loss_mask=None, document_ids=None,
        positions=None, images=None, patch_ids=None,
    )  # fmt: skip
    number = iter(range(10**9))
    sizes = Sizes(engine.runner.optimizer, engine.runner.module.parameters())
    return lambda: float(engine.train_step([micro_batch], step=next(number)).loss), sizes


def worker(kind: str, contender: str, shape: str, precision: str, threads: int) -> None:
    """Train a round of the seconds on each line of stdin; print its speed and what it holds."""
    import torch

    torch.set_num_threads(threads)
    *_, seq, batch, vocab = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab, (batch, seq + 1), generator=generator).to(device)
    if contender in ("ours", "full"):
        chosen = kind if contender == "ours" else "full"
        step, sizes = ours(chosen, shape, precision, tokens)
    else:
        step, sizes = theirs(contender, shape, precision, tokens)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        count, begin = 0, clock()
        while count < 2 or clock() - begin < float(line):
            step()
            count += 1
        rate = count * seq * batch / (clock() - begin)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        found = {"tokens_per_s": rate, "peak_mib": peak, "trained": sizes.trained}
        print(json.dumps(found | {"gradients": sizes.gradients, "state": sizes.state}), flush=True)


def start(kind: str, contender: str, shape: str, precision: str, threads: int) -> subprocess.Popen:
    """A worker that has made its first steps."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "RANK": "0", "WORLD_SIZE": "1",
        "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "--worker", kind, contender, shape, precision, str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    if not any(line.strip() == "ready" for line in process.stdout):
        raise RuntimeError(f"{contender} at {shape} {precision} did not start")
    return process


def ask(process: subprocess.Popen, seconds: float) -> dict[str, float]:
    """One round."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    return next(json.loads(line) for line in process.stdout if line.startswith("{"))


Answers = dict[str, list[dict[str, float]]]


def compare(kind: str, shape: str, precision: str, options: argparse.Namespace) -> Answers:
    """What each contender answered in every round, for one kind, shape and precision."""
    processes = {c: start(kind, c, shape, precision, options.threads) for c in KINDS[kind]}
    results: Answers = {name: [] for name in processes}
    try:
        for _ in range(options.rounds):
            for name, process in processes.items():
                results[name].append(ask(process, options.seconds))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return results


def rows(kind: str, shape: str, precision: str, results: Answers) -> list[str]:
    """Rows of the table."""
    found = []
    for name, answers in results.items():
        rate = statistics.median(a["tokens_per_s"] for a in answers)
        pairs = zip(results["ours"], answers)
        ratio = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
        last = answers[-1]
        found.append(
            f"| {kind} | {shape} | {precision} | {name} | {rate:,.0f} | {ratio:.2f} | {last['trained']:,} | "
            f"{last['gradients'] / 2**20:.2f} | {last['state'] / 2**20:.2f} | {last['peak_mib']:,.0f} |"
        )
    return found


def unequal(shape: str, results: Answers) -> list[str]:
    """A line for each contender that trains another number of parameters than ours for the same end."""
    trained = {name: round(answers[-1]["trained"]) for name, answers in results.items()}
    return [
        f"{shape}: ours trains {trained['ours']:,} numbers, {name} {count:,}: their ratio is not of equal adapters."
        for name, count in trained.items()
        if name != "full" and count != trained["ours"]
    ]


def main() -> None:
    """Print the table, and which of its ratios are not of equals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        *names, threads = options.worker
        worker(*names, int(threads))
        return
    print(
        f"threads {options.threads}, {options.rounds} rounds of {options.seconds} s; rank {RANK}; on a CPU seconds of the process"
    )
    print("\n| trained | shape | precision | contender | tokens/s | ours is | numbers trained | gradients MiB | optimizer MiB | peak MiB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    notes: dict[str, None] = {}  # in order, once each
    for kind in options.kinds:
        for shape in options.shapes:
            for precision in options.precisions:
                results = compare(kind, shape, precision, options)
                print("\n".join(rows(kind, shape, precision, results)), flush=True)
                notes |= dict.fromkeys(unequal(shape, results))
    if notes:
        print(
            "\nOurs has one A for query, key and value and one for gate and up, peft one for each."
        )
        print("\n".join(notes))


if __name__ == "__main__":
    main()
