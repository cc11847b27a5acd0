"""A ladder of small runs, laid out: settings of each run, its parameters, its tokens.

    conf/ladder/NAME.yaml --lay_out--> Rung, ...: one for each size and number of tokens, and the
                                       targets that the ladder is to speak of

Every rung is a run of pipeline.train with the settings of `Rung.words`. Nothing is trained here,
and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from pipeline import cli
from pipeline.config.choices import Position
from pipeline.config.model import ModelConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape, derive
from pipeline.errors import ConfigError
from pipeline.planning.flops import flops_per_token, num_parameters

LEAST_RUNS = 6
"""Five coefficients are fitted; the sixth run is the first that says how wrong they are."""
LEAST_KINDS = 3
"""Different sizes, and different numbers of tokens: a curve through two has any exponent."""


@dataclass
class SizeConfig:
    """One size of model, and how long its runs are."""

    settings: list[str] = field(default_factory=list)
    """Settings of pipeline.train that make this size."""
    tokens: list[float] = field(default_factory=list)
    """Training tokens of its runs, a run each."""


@dataclass
class TargetConfig:
    """A run whose loss the ladder is to tell before it is made."""

    settings: list[str] = field(default_factory=list)
    """Settings of pipeline.train that make its size."""
    tokens: float = MISSING
    """Training tokens."""


@dataclass
class LrRule:
    """lr = coefficient * parameters^parameters_exponent * tokens^tokens_exponent.

    For example 1.79, -0.713, 0.307 (Li et al. 2025, arXiv:2503.04715).
    """

    coefficient: float = MISSING
    """The learning rate of one parameter and one token."""
    parameters_exponent: float = 0.0
    """Of the parameters without embeddings; larger models take smaller rates: negative."""
    tokens_exponent: float = 0.0
    """Of the training tokens of a run."""


@dataclass
class LadderConfig:
    """Runs that differ in size and tokens alone. Ladders: conf/ladder/."""

    name: str = ""
    """The runs live in <runs_dir>/<name>/<size>-<tokens>."""
    runs_dir: str = "runs"
    """Folder that holds the ladder's folder."""
    settings: list[str] = field(default_factory=list)
    """Settings of pipeline.train that all runs share, targets too."""
    sizes: dict[str, SizeConfig] = field(default_factory=dict)
    """Name of a size to its settings and its runs' tokens."""
    targets: dict[str, TargetConfig] = field(default_factory=dict)
    """Name to settings and tokens of a larger run."""
    warmup_share: float = 0.02
    """Part of each run's tokens in which the learning rate warms up; 0: as the settings say."""
    lr: LrRule | None = None
    """Learning rate of each run, targets too; null: as the settings say, e.g. one for all under
    model.init=mup.
    """


@dataclass(frozen=True)
class Rung:
    """A run of the ladder, or a target."""

    name: str
    """Of the run's folder."""
    size: str
    words: tuple[str, ...]
    """Settings of pipeline.train."""
    cfg: PretrainConfig
    shape: RunShape

    @property
    def parameters(self) -> int:
        """N: numbers that a token is multiplied with; see num_active."""
        return num_active(self.cfg.model, self.shape.vocab_size)

    @property
    def tokens(self) -> int:
        """D: training tokens, whole steps."""
        return self.shape.total_tokens

    @property
    def flops(self) -> float:
        """Operations of the whole run, attention and output head included."""
        return self.tokens * flops_per_token(
            self.cfg.model,
            self.cfg.finetune,
            vocab_size=self.shape.vocab_size,
            seq_len=self.shape.seq_len,
        )


def num_active(model: ModelConfig, vocab_size: int) -> int:
    """Parameters without the tables that are only looked up: 6 N D is the work of a run.

    With tied embeddings the table is the output head too, and counts: then N is Chinchilla's, all
    parameters. Without the head, as Kaplan et al. count, losses of small models lie on no line
    (Pearce & Song 2024, arXiv:2406.12907).
    """
    tables = 0 if model.tied_embeddings else vocab_size * model.hidden_size
    if model.position is Position.learned:
        tables += model.max_seq_len * model.hidden_size
    return num_parameters(model, vocab_size) - tables


def lay_out(ladder: LadderConfig, *, world_size: int, vocab_size: int) -> list[Rung]:
    """The runs, the cheapest first.

    Args:
        ladder: sizes and tokens.
        world_size: processes of each run.
        vocab_size: of the tokenizer.

    Raises:
        ConfigError: a run is not legal, the runs differ in more than size and length, or they are
            too few to fit five coefficients.
    """
    rungs = [
        _rung(ladder, _name(size, tokens), size, config.settings, tokens, world_size, vocab_size)
        for size, config in ladder.sizes.items()
        for tokens in config.tokens
    ]
    problems = [*too_few(rungs), *_more_than_size_differs(rungs), *_double(rungs)]
    if problems:
        raise ConfigError("\n".join(problems))
    return sorted(rungs, key=lambda rung: rung.flops)


def lay_out_targets(
    ladder: LadderConfig, rungs: Sequence[Rung], *, world_size: int, vocab_size: int
) -> list[Rung]:
    """The larger runs; arguments and errors as above.

    Args:
        rungs: what lay_out gave: a target differs from them in size and length alone.
    """
    targets = [
        _rung(ladder, name, name, config.settings, config.tokens, world_size, vocab_size)
        for name, config in ladder.targets.items()
    ]
    problems = [*_more_than_size_differs([*rungs[:1], *targets]), *_double([*rungs, *targets])]
    if problems:
        raise ConfigError("\n".join(problems))
    return targets


def settings_of(ladder: LadderConfig) -> PretrainConfig:
    """What all runs share, as one config: whose data to look at, before any size is known.

    Raises:
        ConfigError: no size, or a setting that pipeline.train does not know.
    """
    if not ladder.name or not ladder.sizes:
        raise ConfigError(
            "there is no ladder: it needs a name and sizes. Choose one with ladder=NAME "
            "(conf/ladder/NAME.yaml; ladder=quickstart is an example)."
        )
    first = next(iter(ladder.sizes.values()))
    words = [*ladder.settings, *first.settings, f"name={ladder.name}"]
    return cli.compose(PretrainConfig, words, config="pretrain")


def _name(size: str, tokens: float) -> str:
    return f"{size}-{tokens:.0f}"


def _rung(
    ladder: LadderConfig,
    name: str,
    size: str,
    settings: Sequence[str],
    tokens: float,
    world_size: int,
    vocab_size: int,
) -> Rung:
    """One run, composed and derived; a broken rule is told with the run's name."""
    words = [
        *ladder.settings,
        *settings,
        f"name={name}",
        f"runs_dir={ladder.runs_dir}/{ladder.name}",
        f"training.total_tokens={tokens:.0f}",
        "training.total_steps=null",
    ]
    if ladder.warmup_share:
        warmup = round(ladder.warmup_share * tokens)
        words += ["schedule.warmup_steps=0", f"schedule.warmup_tokens={warmup}"]
    try:
        cfg = cli.compose(PretrainConfig, words, config="pretrain")
        if ladder.lr is not None:
            active = num_active(cfg.model, cfg.model.vocab_size or vocab_size)
            words.append(f"optimizer.lr={_lr(ladder.lr, active, tokens):.6g}")
            cfg = cli.compose(PretrainConfig, words, config="pretrain")
        shape = derive(cfg, world_size=world_size, tokenizer_vocab_size=vocab_size)
    except ConfigError as error:
        raise ConfigError(f"run {name} of the ladder {ladder.name}: {error}") from None
    return Rung(name, size, tuple(words), cfg, shape)


def _lr(rule: LrRule, parameters: int, tokens: float) -> float:
    return float(
        rule.coefficient * parameters**rule.parameters_exponent * tokens**rule.tokens_exponent
    )


def too_few(rungs: Sequence[Rung]) -> Iterator[str]:
    """Five coefficients need runs, and of several sizes and lengths."""
    if len(rungs) < LEAST_RUNS:
        yield (
            f"{len(rungs)} runs do not tell five coefficients and their error; at least "
            f"{LEAST_RUNS} are needed. Add sizes, or tokens to them."
        )
    for what, kinds in (
        ("sizes", {rung.parameters for rung in rungs}),
        ("numbers of tokens", {rung.tokens for rung in rungs}),
    ):
        if len(kinds) < LEAST_KINDS:
            yield (
                f"the runs have {len(kinds)} different {what}; at least {LEAST_KINDS} are needed, "
                "for through two points goes a power law with any exponent."
            )


def _more_than_size_differs(rungs: Sequence[Rung]) -> Iterator[str]:
    """Losses on other data, in other tokens or at other lengths do not lie on one curve."""
    if not rungs:
        return
    first = rungs[0]
    for rung in rungs:
        if rung.cfg.model.moe.num_experts:
            yield f"{rung.name}: mixtures of experts follow another law than one in N and D."
        for what, one, other in (
            ("training.seq_len", first.shape.seq_len, rung.shape.seq_len),
            ("vocabularies", first.shape.vocab_size, rung.shape.vocab_size),
            ("data", _data(first.cfg), _data(rung.cfg)),
            ("finetune", first.cfg.finetune, rung.cfg.finetune),
        ):
            if one != other:
                values = f": {one} and {other}" if isinstance(one, int) else ""
                yield (
                    f"{first.name} and {rung.name} have different {what}{values}; runs of a ladder "
                    "differ in size and length alone. Move the setting to ladder.settings."
                )


def _data(cfg: PretrainConfig) -> object:
    """What is read and scored, apart from how it gets here."""
    data = replace(cfg.data, cache_dir=None, cache_size_gib=0, prefetch_steps=0)
    return data, cfg.training.eval_sequences


def _double(rungs: Sequence[Rung]) -> Iterator[str]:
    """Each run has a folder of its own."""
    names = [rung.name for rung in rungs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two runs of the ladder are called {name}; rename the size, or change its tokens."
