"""Where chat templates run: Jinja's sandbox, with bounds on the time and memory of a dialogue.

A stranger's template runs no code of his here. But loops in loops, or a text that is doubled fifty
times, took the machine's memory or days, where somebody wanted to ask a model.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MARK = "\0"  # around what is learned; no text of a dialogue may hold it
MOST_CPU_S = 10.0
MOST_BYTES = 1 << 30
"""Of memory and time for one dialogue; a real one takes a millisecond."""


class TooLong(Exception):
    """A template computes for ever."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let the block have MOST_BYTES of memory, and on the main thread MOST_CPU_S.

    Raises:
        MemoryError, TooLong: it wants more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as file:
        pages = int(file.read(40).split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    is_main = threading.current_thread() is threading.main_thread()

    def stop(*_: object) -> None:
        raise TooLong(f"more than {MOST_CPU_S} s for one dialogue")

    before = signal.signal(signal.SIGVTALRM, stop) if is_main else None
    try:
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_S)
        yield
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
            signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks its text as what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{MARK}{caller()}{MARK}"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, in which no single operation takes minutes."""

    intercepted_binops = frozenset(["**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The power of two numbers, of which Python would compute one of any length."""
        if not (isinstance(right, int | float) and abs(right) <= 64):
            raise jinja2.TemplateError(f"it raises a number to the power {right!r:.20}")
        return super().call_binop(context, operator, left, right)


def sandbox() -> Sandbox:
    """What transformers gives to templates, but for the clock: it would change the bytes daily."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda _: refuse(
        "it asks for the date, and its text would differ from day to day"
    )
    return environment
