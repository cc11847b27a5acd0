import base64
import random

import pytest

from data_prep.sources.pii import EMAIL, IP, PHONE, SECRET, remove_pii
from tests.support.cpu_limit import cpu_limit

EVERYTHING = {"emails": True, "ips": True, "phones": True, "secrets": True}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Write to ada.lovelace+x@maths.ox.ac.uk.", f"Write to {EMAIL}."),
        ("<a@b.io>,(c-d@e.org)", f"<{EMAIL}>,({EMAIL})"),
        ("from 8.8.8.8 to 193.0.6.139.", f"from {IP} to {IP}."),
        ("call +49 30 901820 now", f"call {PHONE} now"),
        ("call +4930901820, now", f"call {PHONE}, now"),
        ("(212) 736-5000 or 212-736-5000.", f"{PHONE} or {PHONE}."),
        ("id=AKIAIOSFODNN7EXAMPLE;", f"id={SECRET};"),
        ("API_KEY = 'q8Zx01hGb7Yt4Lk9wPzR'", f"API_KEY = '{SECRET}'"),
        ('{"password": "hunter2hunter2Xy9"}', f'{{"password": "{SECRET}"}}'),
        ("ghp_" + "a1B2" * 9, SECRET),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----", SECRET),
    ],
)
def test_personal_data_is_replaced(text: str, expected: str) -> None:
    assert remove_pii(text, **EVERYTHING) == expected


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com and x@mail.example.org belong to nobody",
        "192.168.0.1, 10.0.0.7 and 127.0.0.1 are private",
        "version 1.2.3.4.5 and 999.1.1.1 are no addresses",
        "in 1914-1918 about 10,000,000 +/- 5 % fell; see 10.1000/182 and 978-3-16-148410-0",
        "x = a +10000 * b; total: 2024-05-06 12:30:45",
        "password = 'correct horse battery'",
        "token_type = 'authorization_code_grant'",
        "@decorator def f(self): a@b",
    ],
)
def test_what_only_looks_similar_stays(text: str) -> None:
    assert remove_pii(text, **EVERYTHING) == text


def test_each_kind_can_be_switched_off() -> None:
    text = "a@b.org 8.8.8.8 +49 30 901820 AKIAIOSFODNN7EXAMPLE"
    assert remove_pii(text, emails=False, ips=False, phones=False, secrets=False) == text


def test_emails_and_addresses_agree_with_datatrove_on_prose() -> None:
    """The published rule is the reference where it is not order-dependent."""
    formatters = pytest.importorskip("datatrove.pipeline.formatters.pii")
    theirs = formatters.PIIFormatter(email_replacement=EMAIL, ip_replacement=IP)
    rng = random.Random(0)
    words = [
        "see",
        "bob@uni.edu",
        "a.b-c@x.y.co,",
        "(8.8.4.4)",
        "host 10.1.1.1",
        "end.",
        "1.2",
        "@home",
    ]
    for _ in range(200):
        text = " ".join(rng.choices(words, k=30))
        assert remove_pii(
            text, emails=True, ips=True, phones=False, secrets=False
        ) == theirs.format(text)


@pytest.mark.parametrize(
    "line",
    [
        base64.b64encode(random.Random(1).randbytes(300_000)).decode(),
        "+1" * 150_000,
        "+" + "1234567 " * 40_000,
        "a." * 150_000 + "@",
        "token" * 60_000,
        "eyJ" * 100_000,
        "@a." * 100_000,
        "-----BEGIN PRIVATE KEY-----" * 300,
    ],
    ids=["base64", "plus", "digits", "dots", "token", "eyj", "ats", "pem"],
)
def test_gets_through_hostile_text(line: str) -> None:
    """datatrove's e-mail expression needs minutes for the first of these."""
    with cpu_limit(minutes=1):
        remove_pii(line, **EVERYTHING)
