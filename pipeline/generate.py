"""Sample text from a checkpoint or an exported folder.

    python -m pipeline.generate runs/NAME "def main():" temperature=0.8 top_k=50
    python -m pipeline.generate runs/NAME file=prompts.txt num_samples=4
    python -m pipeline.generate FOLDER interactive=true
    python -m pipeline.generate runs/chat chat=true temperature=0
    python -m pipeline.generate runs/caption "What is this?" image=FILE
    python -m pipeline.generate runs/caption chat=true               /image FILE shows a picture

A file holds one prompt a line, sampled in batches; interactive ones are typed and end with Ctrl-D,
and so does a chat.
A checkpoint is sampled by our own decoder, which needs no more than torch; a Hugging Face folder,
and a checkpoint that is or may be shown a picture, by transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline import cli, log
from pipeline.data.chat import Messages
from pipeline.errors import ConfigError
from pipeline.files import read_file
from pipeline.inference.generation import GenerateConfig, check_drawing
from pipeline.inference.pictures import BLIND, about_pictures, read_picture
from pipeline.inference.samplers import TextSampler, open_sampler

if TYPE_CHECKING:
    from PIL.Image import Image

SHOW = "/image"
"""What begins a line of a chat that shows a picture."""


def main(cfg: GenerateConfig) -> int:
    """Print continuations of every prompt."""
    log.setup()
    check_drawing(cfg)
    prompts = _prompts(cfg)
    if cfg.image is not None:
        read_picture(cfg.image)  # else a damaged one is heard of only after the model was loaded
    with open_sampler(cfg) as sampler:
        import torch  # takes seconds; open_sampler has found what is wrong before it does so

        torch.manual_seed(cfg.seed)
        if cfg.chat:
            if sampler.has_template:
                _talk(sampler, cfg)
            else:
                _write_together(sampler)
            return 0
        if cfg.interactive:
            for prompt in _typed_prompts():
                _print_one(sampler, prompt, cfg)
            return 0
        prompts = [prompt for prompt in prompts for _ in range(cfg.num_samples)]
        if len(prompts) == 1:
            _print_one(sampler, prompts[0], cfg)
            return 0
        for start in range(0, len(prompts), cfg.batch_size):
            batch = prompts[start : start + cfg.batch_size]
            for number, (prompt, text) in enumerate(
                zip(batch, _continue(sampler, batch, cfg), strict=True), start + 1
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


def _typed_prompts(*, shown_if_piped: bool = False) -> Iterator[str]:
    while True:
        try:
            said = input("> ")
        except EOFError:
            return
        if shown_if_piped and not sys.stdin.isatty():  # so that it stands beside the answer
            sys.stdout.write(said + "\n")
        yield said


def _continue(
    sampler: TextSampler,
    prompts: list[str],
    cfg: GenerateConfig,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Continuations of prompts, or what is said of the picture that is shown with each."""
    if cfg.image is None:
        return sampler.sample(prompts, on_text=on_text)
    shown = [read_picture(cfg.image)]
    return sampler.answer([[about_pictures(shown, prompt)] for prompt in prompts], on_text=on_text)


def _talk(sampler: TextSampler, cfg: GenerateConfig) -> None:
    """A dialogue on the terminal; the model sees all of it, or as many last turns as fit.

    `/image FILE` shows a picture with what is said next, which may be nothing.
    """
    messages: Messages = []
    shown = [] if cfg.image is None else [read_picture(cfg.image)]
    for said in _typed_prompts(shown_if_piped=True):
        if said == SHOW or said.startswith(f"{SHOW} "):
            try:
                shown.append(_picture(sampler, said.removeprefix(SHOW).strip()))
            except ConfigError as error:
                log.say(str(error))
            continue
        messages.append(about_pictures(shown, said) if shown else {"role": "user", "content": said})
        shown = []
        try:
            (answer,) = sampler.answer([messages], on_text=_show)
        except ConfigError as error:  # one line too long ends no dialogue
            messages.pop()
            log.say(str(error))
            continue
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})


def _write_together(sampler: TextSampler) -> None:
    """The chat of a model of text: it goes on with all that was typed and written so far.

    What is typed begins a line; an empty line lets the model go on where it stopped. Of a text too
    long for the model it sees the end.
    """
    log.say("no model of dialogues: it goes on with your text, also after an empty line.")
    text = ""
    for said in _typed_prompts(shown_if_piped=True):
        text += f"\n{said}" if text and said else said
        (written,) = sampler.sample([text], on_text=_show)
        sys.stdout.write("\n")
        text += written


def _picture(sampler: TextSampler, path: str) -> Image:
    if sampler.sight is None:
        raise ConfigError(f"{BLIND}.")
    if not path:
        raise ConfigError(f"{SHOW} FILE shows a png, jpeg or webp file with what you say next.")
    return read_picture(path)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_one(sampler: TextSampler, prompt: str, cfg: GenerateConfig) -> None:
    sys.stdout.write(prompt)
    if cfg.image is not None and prompt:  # an answer, not a continuation
        sys.stdout.write("\n")
    _continue(sampler, [prompt], cfg, on_text=_show)
    sys.stdout.write("\n")


if __name__ == "__main__":
    cli.run(main, GenerateConfig, config="generate", positional=("checkpoint", "prompt"))
