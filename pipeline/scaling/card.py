"""What a ladder found: a model card of its predictions, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.scaling.ladder import LadderConfig
from pipeline.scaling.law import Fit
from pipeline.scaling.prediction import Prediction
from pipeline.scaling.runs import Run
from pipeline.tracking.curves import draw_interval, png

# Okabe and Ito's colours, which most eyes tell apart.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442", "#999999")
TARGET_COLOUR = "#d55e00"


def lines(
    ladder: LadderConfig,
    fit: Fit,
    runs: Sequence[Run],
    predictions: Sequence[Prediction],
    *,
    seq_len: int,
    level: float,
    budget: float | None,
) -> Iterator[str]:
    """The card, in Markdown.

    Args:
        ladder: whose runs these are.
        predictions: of its targets.
        seq_len: tokens per sequence, of all runs.
        level: probability of the intervals.
        budget: operations to spend as well as possible; None: not asked.
    """
    yield f"# Predictions of the ladder {ladder.name}"
    yield ""
    if predictions:
        yield "| run | N | D | operations | x largest rung | predicted loss | interval |"
        yield "|---|---|---|---|---|---|---|"
    for p in predictions:
        yield (
            f"| {p.target} | {p.parameters:,} | {p.tokens:,} | {p.flops:.3g} | "
            f"{p.times_largest:.1f} | **{p.loss:.4f}** | {p.low:.4f} to {p.high:.4f} "
            f"({p.level:.0%}) |"
        )
    yield ""
    yield from _law_lines(fit, level)
    if budget is not None:
        yield from _budget_lines(fit, budget, level)
    yield from _run_lines(fit, runs)
    yield from _caveats(runs, seq_len)


def _run_lines(fit: Fit, runs: Sequence[Run]) -> Iterator[str]:
    """Every run, and how far it is from the law."""
    yield ""
    yield f"## From {len(runs)} runs"
    yield ""
    yield "| run | N | D | operations | loss | measured / law |"
    yield "|---|---|---|---|---|---|"
    for run, residual in zip(runs, fit.residuals):
        yield (
            f"| {run.name} | {run.parameters:,} | {run.tokens:,} | {run.flops:.3g} | "
            f"{run.loss:.4f} | {np.expm1(residual):+.2%} |"
        )


def _caveats(runs: Sequence[Run], seq_len: int) -> Iterator[str]:
    """What was counted, and what the prediction does not say."""
    yield ""
    yield "## What this is, and is not"
    yield ""
    yield (
        "N counts the numbers that a token is multiplied with (all but tables that are only looked "
        "up), D training tokens; losses are held out, after the last step, in nats per token."
    )
    yield (
        f"Holds for this data ({_identities(runs)}), its tokenizer, {seq_len} tokens a sequence "
        "and the ladder's settings, each token seen about as often as in the runs. A run that "
        "diverges, repeats its data or changes its recipe is not spoken of."
    )
    yield (
        "The interval has the error of the fit (a bootstrap over the runs) and that of one more "
        "run. It does not know whether the law goes on beyond the runs: the larger the factor in "
        "the table, the more it is a belief."
    )
    yield (
        "Method: Hoffmann et al. 2022 (arXiv:2203.15556), third approach, with the mends of "
        "Besiroglu et al. 2024 (arXiv:2404.10102); see pipeline/scaling/law.py."
    )


def _law_lines(fit: Fit, level: float) -> Iterator[str]:
    """The coefficients, with their intervals."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    yield (
        f"L(N, D) = E + A / N^alpha + B / D^beta; in brackets {level:.0%} of the bootstrap's draws:"
    )
    yield ""
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = np.quantile([getattr(law, name) for law in fit.draws], ends)
        yield f"- {name} = {getattr(fit.law, name):.6g} ({low:.4g} to {high:.4g})"


def _budget_lines(fit: Fit, budget: float, level: float) -> Iterator[str]:
    """The best N and D for so many operations."""
    parameters, tokens = fit.law.optimum(budget)
    found = [law.optimum(budget)[0] for law in fit.draws if law.is_falling]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    yield ""
    yield (
        f"Best for {budget:.3g} operations (6 N D): N = {parameters:.3g} ({low:.3g} to {high:.3g}),"
        f" D = {tokens:.3g}, {tokens / parameters:.1f} tokens a parameter: loss "
        f"{fit.law.loss(parameters, tokens):.4f}"
    )


def _identities(runs: Sequence[Run]) -> str:
    return ", ".join(sorted(identity[:12] for identity in runs[0].datasets)) or "unknown"


def draw(fit: Fit, runs: Sequence[Run], predictions: Sequence[Prediction]) -> bytes:
    """Losses over tokens and over operations, with the law's curves and the targets, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_tokens, by_flops = figure.subplots(1, 2, sharey=True)
    sizes = sorted({(run.parameters, run.size) for run in runs})
    ends = [run.tokens for run in runs] + [p.tokens for p in predictions]
    along = np.geomspace(min(ends), max(ends), 80)
    for (parameters, size), colour in zip(sizes, COLOURS * len(sizes)):
        members = [run for run in runs if run.size == size]
        per_token = members[0].flops / members[0].tokens
        curve = [fit.law.loss(parameters, tokens) for tokens in along]
        for axes, factor in ((by_tokens, 1.0), (by_flops, per_token)):
            axes.plot(along * factor, curve, color=colour, linewidth=1)
            axes.plot(
                [run.tokens * factor for run in members],
                [run.loss for run in members],
                "o",
                color=colour,
                label=f"{size}: N = {parameters:,}",
            )
    for p in predictions:
        for axes, place in ((by_tokens, p.tokens), (by_flops, p.flops)):
            label = f"predicted, {p.level:.0%}: N = {p.parameters:,}"
            draw_interval(
                axes, place, p.loss, (p.low, p.high), color=TARGET_COLOUR, markersize=6, label=label
            )
    for axes, title in ((by_tokens, "training tokens"), (by_flops, "operations")):
        axes.set_xscale("log")
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_tokens.set_title("Held-out loss, nats per token", loc="left", fontsize=10)
    by_tokens.legend(frameon=False, fontsize=8)
    return png(figure, dpi=110)
