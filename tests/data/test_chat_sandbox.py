"""What a stranger's chat template may take of the machine."""

from __future__ import annotations

import resource
import signal
import threading

import pytest

from pipeline.data import chat_sandbox
from pipeline.data.chat import ChatTemplate
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from tests.support.corpus import make_tokenizer

LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(s='a' * 1000) %}{% for i in range(50) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
CALLED = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
)
GREEDY = {
    "loops": LOOP,
    "macros": CALLED,
    "a doubled text": DOUBLED,
    "a constant": "{{ 'a' * 10 ** 11 }}",
    "a large constant": "{{ 'a' * 100000000000 }}",
    "a wide filter": "{{ 'a' | center(100000000000) }}",
    "a wide format": "{{ '%100000000000d' % 1 }}",
    "a power": "{% set n = namespace(x=10) %}{{ n.x ** n.x ** n.x }}",
    "a nested one": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_takes_the_machine_is_refused(tmp_path, monkeypatch, name):
    """Of a checkpoint or a Hugging Face folder, where somebody only wanted to talk to the model: 50 doublings are a petabyte."""
    monkeypatch.setattr(chat_sandbox, "MOST_CPU_S", 0.3)
    monkeypatch.setattr(chat_sandbox, "MOST_BYTES", 1 << 26)
    tokenizer = Tokenizer.from_file(make_tokenizer(tmp_path / "tokenizer.json"))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ConfigError, match="the chat template"):
        ChatTemplate(GREEDY[name], tokenizer)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0.0


def test_a_lower_limit_stays_and_a_thread_has_the_one_of_memory():
    """A job's own limit is not raised; only the main thread hears signals."""
    found = []

    def look() -> None:
        with chat_sandbox.bounded():
            found.append(resource.getrlimit(resource.RLIMIT_AS)[0])

    before = resource.getrlimit(resource.RLIMIT_AS)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert 0 < found[0] != resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (found[0] - (1 << 28), before[1]))
    try:
        look()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert found[1] == found[0] - (1 << 28)
