"""A plan as one page with pictures, that needs no other file and no network.

Plan, the terminal's lines --render--> HTML: memory by stage, seconds by cause, speed by devices
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from pipeline.config.pretrain import PretrainConfig
from pipeline.planning.job import Job
from pipeline.planning.memory import GIB, PARTS
from pipeline.planning.plan import FASTEST, SLOWEST, Plan
from pipeline.planning.search import legal_shape

# Okabe and Ito's colours, which most eyes tell apart.
COLOURS = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#999999", "#cc79a7", "#f0e442",
    "#004949", "#920000", "#6db6ff", "#924900", "#b66dff",
)  # fmt: skip
WIDTH, LEFT, HEIGHT = 860, 70, 260
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em;
color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12.5px }
svg { width: 100%; min-width: 600px; height: auto } .picture { overflow-x: auto }
text { font: 12px system-ui, sans-serif; fill: #333 }
.key span { white-space: nowrap; margin-right: 1.2em } .key i { display: inline-block; width: .9em;
height: .9em; margin-right: .4em; vertical-align: -1px }
"""


@dataclass(frozen=True)
class Speed:
    """What the same run would reach on another number of devices."""

    devices: int
    tokens_per_s: float
    fits: bool


def render(cfg: PretrainConfig, plan: Plan, lines: Sequence[str]) -> str:
    """The page.

    Args:
        cfg: the run's settings, which other numbers of devices are tried with.
        plan: of the run.
        lines: what the terminal shows; stands at the end.
    """
    title = f"{plan.job.model.name} on {plan.job.shape.world_size} x {plan.device.name}"
    time = plan.time.by_cause
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<h2>Memory of a device, by stage: GiB at its peak, of {plan.device.memory_gib:.1f}</h2>",
        _key([*PARTS, "allocator and CUDA"]),
        _memory_picture(plan),
        f"<h2>A step by cause: {plan.time.total:.3g} s by the formula</h2>",
        _key([name for name, seconds in time.items() if seconds > 0]),
        _time_picture([seconds for seconds in time.values() if seconds > 0]),
        "<h2>Tokens/s against the number of devices, everything else as it is</h2>",
        "<p>The band is where real runs lie; hollow: it does not fit. Dashes: in proportion.</p>",
        _speed_picture(list(speeds(cfg, plan)), plan),
        f"<h2>In numbers</h2><pre>{escape(chr(10).join(lines))}</pre>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def speeds(cfg: PretrainConfig, plan: Plan) -> Iterator[Speed]:
    """The run on a sixteenth to sixteen times as many devices, where the rules allow it."""
    shape = plan.job.shape
    for exponent in range(-4, 5):
        devices = shape.world_size * 2**exponent
        if devices < 1 or devices != int(devices):
            continue
        changed = legal_shape(cfg, world_size=int(devices), vocab_size=shape.vocab_size)
        if changed is not None:
            other = Plan(Job.of(cfg, changed), plan.device)
            yield Speed(int(devices), other.tokens_per_s, other.fits)


def _key(names: Sequence[str]) -> str:
    """What each colour means."""
    marks = (
        f"<span><i style='background:{colour}'></i>{escape(name)}</span>"
        for name, colour in zip(names, COLOURS)
    )
    return f"<p class='key'>{''.join(marks)}</p>"


def _memory_picture(plan: Plan) -> str:
    """A stacked bar a stage, under the line of what the device has."""
    top = max(plan.device.memory_gib, plan.worst.total / GIB) * 1.05
    step = (WIDTH - LEFT) / len(plan.memory)
    parts = [_axis(top)]
    for memory in plan.memory:
        values = [*(getattr(memory, part) for part in PARTS), memory.overhead]
        left, bottom = LEFT + memory.stage * step + 0.1 * step, float(HEIGHT)
        for value, colour in zip(values, COLOURS):
            height = value / GIB / top * HEIGHT
            bottom -= height
            parts.append(_bar(left, bottom, 0.8 * step, height, colour))
        parts.append(_text(left + 0.4 * step, HEIGHT + 16, str(memory.stage), "middle"))
    line = HEIGHT * (1 - plan.device.memory_gib / top)
    parts.append(_line([(LEFT, line), (WIDTH, line)], "#000", dashed=True))
    return _svg(parts, HEIGHT + 24)


def _time_picture(seconds: Sequence[float]) -> str:
    """One bar, cut by cause."""
    parts, left, total = [], 0.0, sum(seconds)
    for value, colour in zip(seconds, COLOURS):
        width = value / total * WIDTH
        parts.append(_bar(left, 0, width, 46, colour))
        if width > 40:
            parts.append(_text(left + width / 2, 62, f"{value / total:.0%}", "middle"))
        left += width
    return _svg(parts, 70)


def _speed_picture(found: Sequence[Speed], plan: Plan) -> str:
    """Tokens/s over devices, both logarithmic in base 2."""
    if len(found) < 2:
        return "<p>No other number of devices goes with these settings.</p>"
    least, most = found[0], found[-1]
    top = max(speed.tokens_per_s for speed in found) * FASTEST * 1.05
    doublings = math.log2(most.devices / least.devices)

    def place(devices: float, rate: float) -> tuple[float, float]:
        along = math.log2(devices / least.devices) / doublings
        return LEFT + 30 + along * (WIDTH - LEFT - 60), HEIGHT * (1 - rate / top)

    upper = [place(s.devices, s.tokens_per_s * FASTEST) for s in found]
    lower = [place(s.devices, s.tokens_per_s * SLOWEST) for s in found]
    band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    one = plan.tokens_per_s / plan.job.shape.world_size
    # Up to the height of the picture, or the last number of devices.
    end = min(top / one, most.devices)
    along = [*(float(s.devices) for s in found if s.devices < end), end]
    ideal = [place(devices, one * devices) for devices in along]
    parts = [
        _axis(top),
        f"<polygon points='{band}' fill='{COLOURS[1]}' opacity='.35'/>",
        _line(ideal, "#777", dashed=True),
        _line([place(s.devices, s.tokens_per_s) for s in found], COLOURS[0]),
    ]
    for speed in found:
        x, y = place(speed.devices, speed.tokens_per_s)
        fill = COLOURS[0] if speed.fits else "#fff"
        parts.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{fill}' stroke='{COLOURS[0]}'/>"
        )
        parts.append(_text(x, HEIGHT + 16, f"{speed.devices:,}", "middle"))
    return _svg(parts, HEIGHT + 24)


def _axis(top: float) -> str:
    """Lines at round values up to the height, three to seven of them; the heading has the unit."""
    scale = 10.0 ** math.floor(math.log10(top / 3))
    step = scale * next(factor for factor in (5, 2, 1) if factor * scale <= top / 3)
    parts = []
    for number in range(int(top / step) + 1):
        value = number * step
        y = HEIGHT * (1 - value / top)
        parts.append(_line([(LEFT, y), (WIDTH, y)], "#ddd"))
        label = f"{value:,.0f}" if step >= 1 else f"{value:.2g}"
        parts.append(_text(LEFT - 8, y + 4, label, "end"))
    return "".join(parts)


def _bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(0.0, width):.1f}' "
        f"height='{max(0.0, height):.1f}' fill='{colour}'/>"
    )


def _line(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = " stroke-dasharray='6 4'" if dashed else ""
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.5'{dash}/>"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(text)}</text>"


def _svg(parts: Sequence[str], height: float) -> str:
    picture = f"<svg viewBox='0 -10 {WIDTH} {height + 10}' role='img'>{''.join(parts)}</svg>"
    return f"<div class='picture'>{picture}</div>"
