"""One front door for every command: `pretrain train`, `pretrain generate`, ...

    pretrain                                   the commands, a line each
    pretrain tokenize corpus.jsonl data/corpus tokenizer=T.json
    pretrain train model=tiny data.path=data/corpus
    pretrain chat runs/chat
    pretrain serve runs/chat                   a page to talk to
    eval "$(pretrain completion)"              bash completes commands, settings, presets
                                               (completion zsh, completion fish: those)
    pretrain train --help                      what a command is, and its settings

Each of them is a module too: `pretrain train` is `python -m pipeline.train`, which launchers start
many times.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import runpy
import signal
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from pipeline import completion, log, suggestions
from pipeline.errors import ConfigError, of_the_machine, printed

# name -> its module, and words that it begins with; in the order in which one uses them
COMMANDS: dict[str, tuple[str, ...]] = {
    "train-tokenizer": ("data_prep.train_tokenizer",),
    "clean": ("data_prep.clean",),
    "tokenize": ("data_prep.tokenize",),
    "conversations": ("data_prep.conversations",),
    "import-tokens": ("data_prep.import_tokens",),
    "finalize": ("data_prep.finalize",),
    "verify": ("data_prep.verify",),
    "show": ("data_prep.show",),
    "find-documents": ("data_prep.trace",),
    "plan": ("pipeline.plan",),
    "scaling": ("pipeline.scaling.__main__",),
    "preflight": ("pipeline.preflight",),
    "train": ("pipeline.train",),
    "sweep": ("pipeline.sweep",),
    "report": ("pipeline.report",),
    "evaluate": ("pipeline.evaluate",),
    "generate": ("pipeline.generate",),
    "chat": ("pipeline.generate", "chat=true"),
    "serve": ("pipeline.serve",),
    "answer": ("pipeline.answer",),
    "probe": ("pipeline.probe",),
    "activations": ("pipeline.activations",),
    "checkpoint": ("pipeline.checkpoint.__main__",),
    "export": ("pipeline.export",),
    "hf-import": ("pipeline.hf_import",),
    "trace": ("pipeline.trace",),
    "memorization": ("pipeline.memorization",),
    "order-audit": ("pipeline.order_audit",),
    "node-check": ("pipeline.node_check",),
}
SAID = {
    "chat": "Talk to a model on the terminal, or write a text with it: generate chat=true.",
    "tokenize": "Text to training shards: OUT/train and OUT/validation.",
}
KNOWN_AS = {
    "prepare": "tokenize", "pretrain": "train", "finetune": "train", "sample": "generate",
    "eval": "evaluate", "inspect": "show", "convert": "export", "import": "hf-import",
    "tokenizer": "train-tokenizer", "download": "hf-import",
    "dump": "activations", "sae": "activations",
}  # fmt: skip


def main() -> None:
    """Run the command that the first word names, with the words behind it."""
    log.open_standard_streams()
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        _show(commands_page() + "\n")
    if name == "completion":
        _show_completion(words)
    if name == completion.ASK:
        name, *words = _asked(words)
    name = name.replace("_", "-")
    if name not in COMMANDS:
        log.say(printed(ConfigError(_no_command(name))))
        sys.exit(ConfigError.exit_code)
    module, *first = COMMANDS[name]
    sys.argv[1:] = words if words[:1] == [completion.ASK] else [*first, *words]
    # As `python -m module` does it: processes that the command starts find its name.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _show(text: str) -> NoReturn:
    """Print and exit: 2 where the output is full, and as a pipe's end where nobody reads it."""
    try:
        print(text, end="", flush=True)
        sys.exit(0)
    except OSError as error:
        with contextlib.suppress(OSError):
            log.flush_output()
        refused = of_the_machine(error)
        if refused is not None:
            log.say(printed(refused))
        sys.exit(refused.exit_code if refused is not None else 128 + signal.SIGPIPE)


def _show_completion(words: list[str]) -> NoReturn:
    """The script of the shell that is named; bash, where none is."""
    try:
        shell, *more = words or ["bash"]
        if more:
            raise ConfigError(f"one shell at a time: pretrain completion {shell}.")
        text = completion.script(shell)
    except ConfigError as error:
        log.say(printed(error))
        sys.exit(error.exit_code)
    _show(text)


def _asked(words: list[str]) -> list[str]:
    """The command that is asked what it offers; a name that is not whole: print names."""
    if len(words) > 1 and words[0] in COMMANDS:
        return [words[0], completion.ASK, words[-1]]
    known = completion.SCRIPTS if words[:-1] == ["completion"] else [*COMMANDS, "completion"]
    print("\n".join(name for name in known if name.startswith(words[-1] if words else "")))
    sys.exit(0)


def commands_page() -> str:
    """The docstring, and a line for each command."""
    lines = [(__doc__ or "").strip(), "", "Commands:"]
    for name in COMMANDS:
        first, rest = f"  {name:16} ", 19 * " "
        lines += textwrap.wrap(summary(name), 78, initial_indent=first, subsequent_indent=rest)
    return "\n".join(lines)


def summary(name: str) -> str:
    """The first line of a command's module, which is read and not imported."""
    if name in SAID:
        return SAID[name]
    spec = importlib.util.find_spec(COMMANDS[name][0])
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return text.partition("\n")[0]


def _no_command(name: str) -> str:
    """What to say of a first word that is none."""
    known = KNOWN_AS.get(name)
    near = suggestions.did_you_mean([known]) if known else suggestions.for_option(name, [*COMMANDS])
    setting = " Settings come behind the command: pretrain train key=value." if "=" in name else ""
    return f"there is no command '{name}'.{near}{setting} Commands: {', '.join(COMMANDS)}."


if __name__ == "__main__":
    main()
