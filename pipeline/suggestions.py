"""What somebody meant who wrote a name that is none: another program's, a beginning, a slip.

word, schema  --for_setting--> " Did you mean optimizer.lr?"    learning_rate, optimizer.l, lrr
word, options --for_option-->  " Did you mean gpt2-124m, ...?"  gpt2, gpt2-small, gtp2-124m
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from pipeline import schema as schemas

MOST = 4
"""Suggestions on one line."""

# Settings by the names that nanoGPT, litgpt, Megatron-LM, transformers and others give them; of
# several the ones that the command has.
_KNOWN_AS = """
    optimizer.lr: learning_rate max_lr peak_lr
    schedule.min_lr: min_learning_rate lr_end eta_min
    schedule.decay: lr_scheduler lr_scheduler_type lr_decay_style scheduler decay_lr
    schedule.warmup_steps: warmup warmup_iters lr_warmup_iters num_warmup_steps lr_warmup_steps
    schedule.decay_steps: lr_decay_iters
    optimizer.clip_grad: grad_clip gradient_clipping gradient_clip max_grad_norm clip_grad_norm
    optimizer.beta1: adam_beta1
    optimizer.beta2: adam_beta2
    optimizer.eps: adam_epsilon adam_eps
    optimizer.weight_decay: wd
    training.global_batch_size batch_size: batch_size bs train_batch_size total_batch_size
    training.micro_batch_size micro_batch_size: micro_batch per_device_train_batch_size mbs
    training.micro_batch_size micro_batch_size: device_batch_size train_micro_batch_size_per_gpu
    training.total_steps: max_steps steps train_iters max_iters num_steps iterations
    training.total_steps: num_iterations train_steps
    training.total_tokens: max_tokens tokens num_tokens train_tokens
    training.seq_len seq_len: block_size seq_length sequence_length context_length max_seq_length
    training.seq_len seq_len: max_length context_size
    training.precision precision: dtype bf16 fp16 mixed_precision torch_dtype fp32
    training.recompute: gradient_checkpointing activation_checkpointing recompute_granularity
    training.eval_every: eval_interval eval_steps evaluation_steps
    training.eval_sequences: eval_iters eval_size
    model.num_layers: n_layer n_layers layers depth num_hidden_layers
    model.hidden_size: n_embd d_model dim width embed_dim hidden_dim emb_dim
    model.num_attention_heads: n_head n_heads num_heads heads
    model.num_query_groups: n_kv_heads num_key_value_heads num_kv_heads n_query_groups kv_heads
    model.ffn_hidden_size: intermediate_size d_ff mlp_hidden ffn_dim
    model.max_seq_len: max_position_embeddings n_positions n_ctx
    model.hidden_dropout: dropout resid_pdrop
    model.tied_embeddings: tie_word_embeddings weight_tying tie_weights
    parallel.tensor_parallel_size: tp tensor_parallel tensor_model_parallel_size tp_size
    parallel.pipeline_parallel_size: pp pipeline_parallel pipeline_model_parallel_size pp_size
    parallel.zero_stage: zero zero_level fsdp zero_optimization
    data.path input: dataset data_dir data_path train_data dataset_path files corpus
    checkpoint.save_every: save_interval save_steps checkpoint_interval ckpt_interval
    checkpoint.keep_last: save_total_limit
    checkpoint.init_from: pretrained pretrained_model init_checkpoint
    checkpoint.init_tower: vision_tower mm_vision_tower tower
    tracking.log_every: log_interval logging_steps log_steps
    tracking.project: wandb_project
    tracking.entity: wandb_entity
    tracking.wandb: report_to wandb_mode wandb_log
    tracking.tensorboard: use_tensorboard tensorboard_dir tensorboard_log_dir
    runs_dir output: output_dir out_dir save_dir out
    name: run_name wandb_run_name experiment_name exp_name wandb_name
    checkpoint run: model model_path ckpt model_name model_name_or_path run_dir path folder
    max_new_tokens: max_tokens max_length length num_tokens n_tokens new_tokens
    prompt: text input start
    num_samples: n num_return_sequences samples
    workers: num_workers num_proc processes threads
    tokenizer: tokenizer_path tokenizer_name vocab_file
    dtype: precision torch_dtype
"""
KNOWN_AS: dict[str, list[str]] = {}
for _line in _KNOWN_AS.strip().splitlines():
    _settings, _, _names = _line.partition(":")
    for _name in _names.split():
        KNOWN_AS.setdefault(_name, []).extend(_settings.split())

# What is no setting of a run, by name.
_PROCESSES = "Each process takes a device: launch/local.sh N starts N on this machine, srun more."
_LENGTH = (
    "A run is as long as training.total_steps or training.total_tokens says; its log names the "
    "passes over the data, and data.train[].max_epochs bounds them."
)
_MICRO_BATCHES = (
    "Micro-batches follow from training.global_batch_size, training.micro_batch_size and the ranks."
)
_RESUME = (
    "The same command goes on at the newest checkpoint of the run; checkpoint.init_from starts "
    "from the weights of another."
)
NOTES = {
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_epochs"), _LENGTH),
    **dict.fromkeys(("dp", "ddp", "data_parallel", "data_parallel_size", "dp_size"), _PROCESSES),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpu", "devices", "nproc", "num_nodes"), _PROCESSES),
    **dict.fromkeys(("nproc_per_node", "world_size", "device"), _PROCESSES),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"), _MICRO_BATCHES
    ),
    **dict.fromkeys(("resume_from", "resume_from_checkpoint", "load", "load_from"), _RESUME),
}

# Options of groups by other names.
OPTIONS = {
    "gpt2small": "gpt2-124m", "gpt2medium": "gpt2-355m", "gpt2large": "gpt2-774m",
    "gpt2xl": "gpt2-1558m", "gpt2117m": "gpt2-124m", "gpt21.5b": "gpt2-1558m",
    "gpt": "gpt1-117m", "nanogpt": "tiny", "llama": "modern-1.3b", "llama2": "modern-7b",
    "llama3": "modern-7b", "qwen": "modern-1.3b", "mistral": "modern-7b", "adam": "adamw",
    "fsdp": "zero3", "ddp": "default", "zero1": "default", "peft": "lora", "qlora": "lora",
    "none": "local", "offline": "local",
}  # fmt: skip


def for_setting(word: str, schema: type, *, section: Sequence[str] = ()) -> str:
    """What to say after `there is no setting`, with a space before it; empty: nothing is near.

    Args:
        word: the key as it was written.
        schema: dataclass of the command.
        section: the keys beside it, where its section exists.
    """
    word = word.strip("-+~").replace("-", "_")
    legal = [key for key, _, _ in schemas.settings(schema) if "[]" not in key]
    name = word.rpartition(".")[2].lower()
    found = [key for key in legal if key.rpartition(".")[2] == name]
    found = found or [key for key in KNOWN_AS.get(name, []) if key in legal]
    if not found and name in NOTES and "training.total_steps" in legal:
        return f" {NOTES[name]}"
    return did_you_mean(found or _near(word, legal, section))


def _near(word: str, legal: Sequence[str], section: Sequence[str]) -> Iterator[str]:
    """Legal keys that begin as the word does, or are spelt nearly so, the likeliest first."""
    name = word.rpartition(".")[2].lower()
    yield from difflib.get_close_matches(word, section, n=1, cutoff=0.8)
    if len(name) >= 2:
        yield from (whole := [key for key in legal if key.startswith(word)])
        if whole and "." in word:
            return  # its section was meant: no other section's setting of this name
        yield from (key for key in legal if key.rpartition(".")[2].startswith(name))
        # whole words of a name: `experts`, `hang`
        yield from (key for key in legal if name in key.rpartition(".")[2].split("_"))
    yield from difflib.get_close_matches(word, section, n=1, cutoff=0.6)
    by_name = {key.rpartition(".")[2]: key for key in legal}
    yield from (by_name[near] for near in difflib.get_close_matches(name, by_name, n=1, cutoff=0.7))


def for_option(word: str, options: Sequence[str]) -> str:
    """What to say after `there is no such option`, as above."""
    plain = _plain(word)
    found = [OPTIONS[plain]] if OPTIONS.get(plain) in options else []
    found += [option for option in options if plain and _plain(option).startswith(plain)]
    return did_you_mean(found or difflib.get_close_matches(word, options, n=1, cutoff=0.6))


def _plain(word: str) -> str:
    return re.sub(r"[-_ ]", "", word.lower())


def did_you_mean(found: Iterable[str]) -> str:
    """` Did you mean a, b or c?`, or nothing."""
    *most, last = list(dict.fromkeys(found))[:MOST] or [""]
    return f" Did you mean {', '.join(most)}{' or ' if most else ''}{last}?" if last else ""
