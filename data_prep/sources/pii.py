r"""Personal data and secrets out of a text, in time linear in its length.

    remove_pii("mail ada@lovelace.uk") -> "mail email@example.com"

datatrove's formatter has the same e-mail and address rules, but hands out its replacements in turn,
so that its output depends on the documents a worker saw before; and its e-mail expression takes
quadratic time on base64. Every repetition here is bounded, or begins where the character before it
cannot belong to the match.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter

EMAIL, IP, PHONE, SECRET = "email@example.com", "192.0.2.1", "+1 555 0100", "REDACTED"
# 192.0.2.0/24 is reserved for documentation (RFC 5737), as 555-01xx is for fiction: neither belongs
# to anybody.

_LOCAL = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~-"  # RFC 5321, without quoted local parts
_EMAIL = re.compile(
    rf"(?<![.{_LOCAL}])[{_LOCAL}](?:\.?[{_LOCAL}]){{0,63}}"
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9])"
)
_RESERVED = re.compile(r"(?:^|\.)example\.(?:com|net|org)$", re.IGNORECASE)  # RFC 2606
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IP = re.compile(rf"(?<![\w.]){_OCTET}(?:\.{_OCTET}){{3}}(?!\w|\.\w)")
_PHONE = re.compile(
    # +49 30 1234567; possessive: no backtracking
    r"(?<![\w+.-])(?:\+[1-9][0-9]{0,2}+(?>[ .-]?\(?[0-9]{1,5}+\)?){2,6}+"
    r"|(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-.])[2-9][0-9]{2}[-. ][0-9]{4})"
    r"(?![\w-]|\.\w)"
)
# Literal -> expression of a key that holds it: looking for the literal first costs next to nothing.
_KEYS = {
    literal: re.compile(expression)
    for literal, expression in {
        "PRIVATE KEY-----": r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----"
        r"[A-Za-z0-9+/=\s\\:,-]{0,20000}?"
        r"-----END (?:[A-Z]+ ){0,3}PRIVATE KEY-----",
        **{start: rf"\b{start}[A-Z0-9]{{16}}\b" for start in ("AKIA", "ASIA")},  # AWS
        **{f"gh{kind}_": rf"\bgh{kind}_[A-Za-z0-9]{{36,251}}\b" for kind in "pousr"},
        "github_pat_": r"\bgithub_pat_[A-Za-z0-9_]{60,251}\b",
        "glpat-": r"\bglpat-[A-Za-z0-9_-]{20,64}\b",  # GitLab
        **{f"xox{kind}-": rf"\bxox{kind}-[A-Za-z0-9-]{{10,200}}\b" for kind in "abprs"},  # Slack
        "AIza": r"\bAIza[A-Za-z0-9_-]{35}(?![\w-])",  # Google
        **{
            f"k_{kind}_": rf"\b[sr]k_{kind}_[A-Za-z0-9]{{16,251}}\b" for kind in ("live", "test")
        },  # Stripe
        "sk-": r"\bsk-[A-Za-z0-9_-]{32,251}(?![\w-])",  # OpenAI, Anthropic
        "hf_": r"\bhf_[A-Za-z0-9]{34}\b",
        "npm_": r"\bnpm_[A-Za-z0-9]{36}\b",
        "pypi-": r"\bpypi-[A-Za-z0-9_-]{50,251}(?![\w-])",
        # JSON web token
        "eyJ": r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}"
        r"\.[A-Za-z0-9_-]{10,2000}(?![\w-])",
    }.items()
}
_QUOTED = re.compile(r"([\"'])([A-Za-z0-9+/=_.~-]{16,256})\1")
_ASSIGNED = re.compile(
    r"(?i:api_?key|secret|token|passw(?:or)?d|access_?key|auth)[A-Za-z_]{0,24}[\"']?"
    r"\s{0,4}(?::|=|=>)\s{0,4}$"
)
_ASSIGNED_CHARS = 48  # of _ASSIGNED, at most


def remove_pii(text: str, *, emails: bool, ips: bool, phones: bool, secrets: bool) -> str:
    """The text with a fixed stand-in for each thing found."""
    if secrets:
        for literal, key in _KEYS.items():
            if literal in text:
                text = key.sub(SECRET, text)
        text = _QUOTED.sub(_replace_random, text)
    if emails and "@" in text:
        text = "\n".join(
            _EMAIL.sub(_replace_email, line) if "@" in line else line for line in text.split("\n")
        )
    if ips:
        text = _IP.sub(lambda m: IP if ipaddress.ip_address(m[0]).is_global else m[0], text)
    if phones:
        text = _PHONE.sub(_replace_phone, text)
    return text


STAND_INS = {"secrets": SECRET, "emails": EMAIL, "ips": IP, "phones": PHONE}


def count_pii(text: str) -> dict[str, int]:
    """How many things of each kind remove_pii would replace; kinds without any are left out.

    A stand-in that was there before counts as nothing found.
    """
    found = {}
    for kind, stand_in in STAND_INS.items():
        cleaned = remove_pii(text, **{name: name == kind for name in STAND_INS})
        if count := cleaned.count(stand_in) - text.count(stand_in):
            found[kind] = count
        text = cleaned
    return found


def _replace_email(match: re.Match[str]) -> str:
    return match[0] if _RESERVED.search(match[1]) else EMAIL


def _replace_random(match: re.Match[str]) -> str:
    """Replace a random value assigned to a key or password: digits, letters, 3 bits a character."""
    if not _ASSIGNED.search(match.string[max(0, match.start() - _ASSIGNED_CHARS) : match.start()]):
        return match[0]
    value = match[2]
    counts = Counter(value)
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    if entropy < 3 or not re.search("[0-9]", value) or not re.search("[A-Za-z]", value):
        return match[0]
    return match[0].replace(value, SECRET)


def _replace_phone(match: re.Match[str]) -> str:
    """Replace 8 to 15 digits (ITU-T E.164), or 10 if nothing but digits says what they are."""
    number = match[0]
    least = 8 if re.search("[ .()-]", number) else 10
    return PHONE if least <= sum(map(str.isdigit, number)) <= 15 else number
