"""No secret leaves the process: whatever is written or said about a run goes through `redact`.

    https://user:password@host/file.jsonl?X-Amz-Signature=4f1..  -->  https://***@host/file.jsonl?***
    an error that quotes the value of AWS_SECRET_ACCESS_KEY      -->  ***

What a run needs to work (the address it reads, the key it signs with) stays in memory; files, logs
and W&B get the redacted form. Hiding too much costs a reader some text, hiding too little a key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
HIDDEN = "***"
LEAST_CHARACTERS = 8
"""A shorter value of a variable is a switch (`false`, `1`), not a secret."""

# Between :// and the first /, ? or blank, everything before the last @.
_USERINFO = re.compile(r"(?<=://)[^\s/?#]*@")
# On the web a ? begins a query. Elsewhere (s3://bucket/part-?.jsonl) it may be a glob, so there
# it must look like one: name=value.
_WEB_QUERY = re.compile(r"(https?://[^\s?#\"'<>]*[?#])[^\s\"'<>|,)\]}]+", re.IGNORECASE)
_QUERY = re.compile(r"(\w+://[^\s?\"'<>]*\?)[\w.%~-]+=[^\s\"'<>|,)\]}]*")
# A key with its name in front, as errors of clients and servers quote it.
_NAMED = re.compile(
    r"""(?ix) (?P<name> \b [\w-]* (?: passw(?:or)?d | passphrase | secret | api[_-]?key
        | access[_-]?key (?:[_-]?id)? | (?:auth|access|session|security|bearer|hf)[_-]?token
        | signature | credential ) \b ["']? \s* [=:] \s* ["']? ) (?P<value> [^\s"'&,;)\]}]{4,} )"""
)
_BEARER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}")
# Keys that are known by their form: Hugging Face, AWS, GitHub, OpenAI, Google, W&B.
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAIza[\w-]{30,}|\bwandb_v\d_[A-Za-z0-9_]{20,}"
)
# Words of a variable's name that say that its value is one. TOKENIZERS_PARALLELISM has none.
_SECRET_WORDS = {
    "KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL",
}  # fmt: skip


def redact(value: T, environment: Mapping[str, str] = os.environ) -> T:
    """`value` without secrets: text, or dicts, lists and tuples of it at any depth.

    Removed are the user part and the query of addresses, values of variables of the environment
    whose name says that they are secret, and what is called a key, password or token.
    """
    return _redact(value, _secrets_of(environment))


def _redact(value: Any, secrets: re.Pattern[str] | None) -> Any:
    """`redact`, with what the environment holds looked up once."""
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, dict):
        return {_redact(key, secrets): _redact(inner, secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_redact(inner, secrets) for inner in value]
    if type(value) is tuple:
        return tuple(_redact(inner, secrets) for inner in value)
    return value


def _redact_text(text: str, secrets: re.Pattern[str] | None) -> str:
    if secrets is not None:
        text = secrets.sub(HIDDEN, text)
    if "://" in text:
        text = _USERINFO.sub(f"{HIDDEN}@", text)
        text = _QUERY.sub(rf"\g<1>{HIDDEN}", _WEB_QUERY.sub(rf"\g<1>{HIDDEN}", text))
    text = _NAMED.sub(lambda match: match["name"] + HIDDEN, text)
    return _FORMS.sub(HIDDEN, _BEARER.sub(rf"\g<1>{HIDDEN}", text))


def _secrets_of(environment: Mapping[str, str]) -> re.Pattern[str] | None:
    """Matches every secret value of the environment, also as addresses and JSON spell it."""
    from urllib.parse import quote

    values: set[str] = set()
    for name, value in environment.items():
        words = re.split(r"[_\W]+", name.upper())
        if len(value) >= LEAST_CHARACTERS and not _SECRET_WORDS.isdisjoint(words):
            values |= {value, quote(value, safe=""), quote(value)}
    # The longest first: one may begin with another.
    found = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
    return re.compile(found) if found else None
