"""Sample text from a checkpoint or an exported folder.

    python -m pipeline.generate runs/NAME "def main():" temperature=0.8 top_k=50
    python -m pipeline.generate runs/NAME file=prompts.txt num_samples=4
    python -m pipeline.generate FOLDER interactive=true
    python -m pipeline.generate runs/chat chat=true temperature=0

A file holds one prompt a line, sampled in batches; interactive ones are typed and end with Ctrl-D,
and so does a chat.
transformers samples, with its key/value cache: a checkpoint is exported to a temporary folder
first. A model that no transformers class computes is sampled through our own forward pass, which
computes the whole prefix for every token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pipeline import cli, log
from pipeline.errors import ConfigError
from pipeline.files import read_file
from pipeline.inference.samplers import (
    GenerateConfig,
    TextSampler,
    check_drawing,
    check_model,
    open_sampler,
)


def main(cfg: GenerateConfig) -> int:
    """Print continuations of every prompt."""
    log.setup()
    check_drawing(cfg)
    prompts = _prompts(cfg)
    check_model(cfg)  # before torch is imported and a checkpoint read, which takes seconds
    import torch

    with open_sampler(cfg) as sampler:
        torch.manual_seed(cfg.seed)
        if cfg.chat:
            _talk(sampler)
            return 0
        if cfg.interactive:
            for prompt in _typed_prompts():
                _print_one(sampler, prompt)
            return 0
        prompts = [prompt for prompt in prompts for _ in range(cfg.num_samples)]
        if len(prompts) == 1:
            _print_one(sampler, prompts[0])
            return 0
        for start in range(0, len(prompts), cfg.batch_size):
            batch = prompts[start : start + cfg.batch_size]
            for number, (prompt, text) in enumerate(
                zip(batch, sampler.sample(batch, on_text=None), strict=True), start + 1
            ):
                print(f"--- {number}\n{prompt}{text}")
    return 0


def _prompts(cfg: GenerateConfig) -> list[str]:
    if cfg.file is None:
        return [cfg.prompt]
    try:
        return read_file(cfg.file).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{cfg.file} cannot be read as text: {error}.") from None


def _typed_prompts() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _talk(sampler: TextSampler) -> None:
    """A dialogue on the terminal; the model sees all of it, or as many last turns as fit."""
    messages: list[dict[str, str]] = []
    for said in _typed_prompts():
        if not sys.stdin.isatty():  # nobody typed it here: what was asked stands beside the answer
            sys.stdout.write(said + "\n")
        messages.append({"role": "user", "content": said})
        (answer,) = sampler.answer([messages], on_text=_show)
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_one(sampler: TextSampler, prompt: str) -> None:
    sys.stdout.write(prompt)
    sampler.sample([prompt], on_text=_show)
    sys.stdout.write("\n")


if __name__ == "__main__":
    cli.run(main, GenerateConfig, config="generate", positional=("checkpoint", "prompt"))
