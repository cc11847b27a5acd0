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

# What secrets are called; nobody else lists such words.
SURE = ("password", "passwd", "passphrase", "secret", "credential", "signature")
"""Whatever has such a name is one."""
UNSURE = {"key": "api access", "token": "auth access session security bearer hf"}
"""So is, as a part of a variable's name or of an address, what has one of these; in a text there
are other keys and tokens, and one of the words beside it must stand in front.
"""
SIGNING = ("sig", "auth", "expires")
"""Names in an address that is signed: what stands there changes from hour to hour."""


def _spelt(words: Mapping[str, str]) -> str:
    """An expression for each word behind one of its others: api_key, access-key-id."""
    others = {word: "|".join(before.split()) for word, before in words.items()}
    return "|".join(rf"(?:{before})[_-]?{word} (?:[_-]?id)?" for word, before in others.items())


# Between :// and the first /, ? or blank, everything before the last @.
_USERINFO = re.compile(r"(?<=://)[^\s/?#]*@")
# On the web a ? begins a query. Elsewhere (s3://bucket/part-?.jsonl) it may be a glob, so there
# it must look like one: name=value.
_WEB_QUERY = re.compile(r"(https?://[^\s?#\"'<>]*[?#])[^\s\"'<>|,)\]}]+", re.IGNORECASE)
_QUERY = re.compile(r"(\w+://[^\s?\"'<>]*\?)[\w.%~-]+=[^\s\"'<>|,)\]}]*")
# A key with its name in front, as errors of clients and servers quote it.
_NAMED = re.compile(
    rf"""(?ix) (?P<name> \b [\w-]* (?: {"|".join(SURE)} | {_spelt(UNSURE)} ) \b ["']? \s* [=:] \s*
        ["']? ) (?P<value> [^\s"'&,;)\]}}]{{4,}} )"""
)
_BEARER = re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}")
# Keys that are known by their form: Hugging Face, AWS, GitHub, OpenAI, Google, W&B.
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAIza[\w-]{30,}|\bwandb_v\d_[A-Za-z0-9_]{20,}"
)
# Of a variable's name, word for word: TOKENIZERS_PARALLELISM has none.
_OF_VARIABLES = {word.upper() for word in (*SURE, *UNSURE, "apikey")}
_OF_QUERIES = re.compile("|".join([*SURE, *UNSURE, *SIGNING]), re.IGNORECASE)


def redact(value: T, environment: Mapping[str, str] = os.environ) -> T:
    """`value` without secrets: text, or dicts, lists and tuples of it at any depth.

    Removed are the user part and the query of addresses, values of variables of the environment
    whose name says that they are secret, and what is called a key, password or token.
    """
    return _redact(value, _secrets_of(environment))


def is_signed(query: str) -> bool:
    """Whether an address's query opens or signs something, and does not only name a file."""
    return _OF_QUERIES.search(query) is not None


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
        if len(value) >= LEAST_CHARACTERS and not _OF_VARIABLES.isdisjoint(words):
            values |= {value, quote(value, safe=""), quote(value)}
    # The longest first: one may begin with another.
    found = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
    return re.compile(found) if found else None
