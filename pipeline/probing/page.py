"""Findings as one web page that needs no other file: lens, heads, attention under the mouse."""

from __future__ import annotations

import html
import json
import math
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: min(2rem, 4vw); }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { padding: .1rem .4rem; font-size: 13px; text-align: left; font-weight: normal; }
td { font-variant-numeric: tabular-nums; border: 1px solid #fff; }
th { color: #666; }
.wide { overflow-x: auto; }
.lens td { font-family: ui-monospace, monospace; white-space: pre; }
#maps { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 2rem; }
.map { max-width: 100%; overflow-x: auto; }
.map td { width: 1.4rem; height: 1.4rem; padding: 0; cursor: pointer; }
.chosen { outline: 2px solid #222; }
#text span { padding: .15rem .1rem; border-radius: 3px; white-space: pre-wrap; cursor: default;
             overflow-wrap: anywhere; font-family: ui-monospace, monospace; line-height: 2; }
#text span.looks { outline: 2px solid #222; }
"""
SCRIPT = """
const data = JSON.parse(document.getElementById("findings").textContent);
const make = (tag, parent, text) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
const shade = share =>
  share === null ? "none" : `rgba(68, 119, 170, ${Math.max(0, Math.min(1, share))})`;
const say = (value, digits) => value === null ? "no number" : value.toFixed(digits);
const times = (value, factor) => value === null ? null : factor * value;
const minus = (value, other) => value === null || other === null ? null : value - other;
const line = token => token.replaceAll("\\n", "\\u23ce");
const ink = share => share > .6 ? "#fff" : "#222";
let block = 0, head = 0, place = -1;

function lens(found, box) {
  const table = make("table", box);
  const top = make("tr", table);
  make("th", top, "after block");
  data.text.tokens.forEach(token => make("th", top, line(token)));
  for (let i = data.layers - 1; i >= 0; i--) {
    const row = make("tr", table);
    make("th", row, i);
    found.tokens[i].forEach((tokens, at) => {
      const chances = found.probabilities[i][at];
      const cell = make("td", row, line(tokens[0]));
      cell.style.background = shade(chances[0]);
      cell.style.color = ink(chances[0]);
      cell.title = tokens.map((t, k) => `${JSON.stringify(t)} ${say(times(chances[k], 100), 1)} %`)
        .join("\\n");
    });
  }
}

function map(name, values, { columns, labels, rows, low = 0, high = null, note = "" }) {
  const box = make("div", document.getElementById("maps"));
  box.className = "map";
  make("h3", box, name);
  if (note) make("p", box, note);
  const flat = values.flat().filter(value => value !== null);
  const most = high ?? Math.max(...flat), least = low ?? Math.min(...flat);
  const table = make("table", box), top = make("tr", table);
  make("th", top, rows ? "head" : "block");
  (labels ?? values[0].map((_, k) => k)).forEach(label => make("th", top, line(`${label}`)));
  for (let i = values.length - 1; i >= 0; i--) {
    const row = make("tr", table);
    make("th", row, rows ? rows[i] : i);
    values[i].forEach((value, k) => {
      const cell = make("td", row);
      cell.style.background = shade(times(minus(value, least), 1 / ((most - least) || 1)));
      const where = rows ? `${rows[i]} at ${labels[k]}` : `${i}.${k}`;
      cell.title = `${columns} ${where}: ${say(value, 4)}`;
      if (columns === "head") {
        cell.dataset.head = `${i}.${k}`;
        cell.onclick = () => { block = i; head = k; draw(); };
      }
    });
  }
}

function draw() {
  document.getElementById("which").textContent = `head ${block}.${head}`;
  document.querySelectorAll("[data-head]").forEach(cell =>
    cell.classList.toggle("chosen", cell.dataset.head === `${block}.${head}`));
  const attention = data.text.attention[block][head];
  document.querySelectorAll("#text span").forEach((span, at) => {
    const share = place < 0 ? 0 : attention[place][at];
    span.style.background = shade(share);
    span.style.color = ink(share);
    span.title = place < 0 ? "" : say(share, 3);
    span.classList.toggle("looks", at === place);
  });
}

const lenses = document.getElementById("lens");
lens(data.text.lens, lenses);
if (data.text.tuned) {
  make("p", lenses, "The same through the tuned lens:");
  lens(data.text.tuned, lenses);
}
const text = document.getElementById("text");
data.text.tokens.forEach((token, at) => {
  const span = make("span", text, token.replaceAll("\\n", "\\u23ce\\n"));
  span.onmouseenter = () => { place = at; draw(); };
});
for (const [name, values] of Object.entries(data.kinds))
  map(name, values, { columns: "head", high: 1 });
map("sink", data.averages.sink, { columns: "head", high: 1 });
map("entropy, nats", data.averages.entropy, { columns: "head" });
if (data.averages.attribution)
  map("attribution", data.averages.attribution.heads, { columns: "head", low: null });
if (data.ablation) {
  const loss = data.ablation.none[0];
  map("ablation", data.ablation.heads.map(row => row.map(value => minus(value, loss))),
    { columns: "head", low: null, note: "loss added without the head" });
}
if (data.curve) {
  const heads = data.kinds.induction.flatMap((row, i) => row.map((_, k) => [i, k]));
  for (const name of Object.keys(data.kinds)) {
    const values = heads.map(([i, k]) => data.curve[name].map(table => table[i][k]));
    const rows = heads.map(([i, k]) => `${i}.${k}`);
    map(`${name} by step`, values, { columns: "step", labels: data.curve.steps, rows, high: 1 });
  }
}
if (data.patching) {
  const found = data.patching, note = "log-probability of " + JSON.stringify(found.answer);
  const ends = { low: Math.min(found.of_other, found.of_prompt),
                 high: Math.max(found.of_other, found.of_prompt), note };
  map("patching: stream", found.streams, { columns: "place", labels: found.tokens, ...ends });
  map("patching: heads", found.heads, { columns: "head", ...ends });
}
draw();
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
<p>{layers} blocks of {heads} heads; means over {tokens:,} tokens.</p>
<h2>Blocks</h2>
<div class="wide">{blocks}</div>
<h2>Lens</h2>
<p>The likeliest next token after each block, darker where it is likelier; the mouse shows five.</p>
<div class="wide lens" id="lens"></div>
<h2>Attention</h2>
<p>What a token under the mouse looks at: <b id="which"></b>. Choose a head below.</p>
<div id="text"></div>
<h2>Heads</h2>
<p>Darker is more; the mouse shows the number, a click the head's attention.</p>
<div id="maps"></div>
<script type="application/json" id="findings">{findings}</script>
<script>{script}</script>
</html>
"""


def page(findings: dict[str, Any]) -> str:
    """The web page."""
    averages = findings["averages"]
    columns = block_columns(averages)
    head = "".join(f"<th>{name}</th>" for name in ("block", *columns.values()))
    rows = "".join(
        f"<tr><th>{i}</th>"
        + "".join(f"<td>{averages[key][i]:.4f}</td>" for key in columns)
        + "</tr>"
        for i in range(findings["layers"])
    )
    return PAGE.format(
        title=html.escape(f"Inside {findings['checkpoint']}"),
        style=STYLE,
        layers=findings["layers"],
        heads=findings["heads"],
        tokens=averages["tokens"],
        blocks=f"<table><tr>{head}</tr>{rows}</table>",
        # `<` never appears in it: no text of a tokenizer ends the element.
        findings=json.dumps(finite(findings, digits=4), allow_nan=False).replace("<", "\\u003c"),
        script=SCRIPT,
    )


def block_columns(averages: dict[str, Any]) -> dict[str, str]:
    """Of the means by block those that there are -> how a table calls them."""
    names = {
        "lens_loss": "lens loss", "tuned_loss": "tuned lens", "residual": "residual",
        "attention": "attention", "mlp": "MLP",
    }  # fmt: skip
    return {name: title for name, title in names.items() if name in averages}


def finite(value: Any, *, digits: int | None = None) -> Any:
    """Nested values, None for each that is no number: JSON has none, and no browser reads NaN.

    digits: decimals that are kept (attention maps are most of the page); None: all.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else round(value, digits)
    if isinstance(value, dict):
        return {key: finite(inner, digits=digits) for key, inner in value.items()}
    return [finite(inner, digits=digits) for inner in value] if isinstance(value, list) else value
