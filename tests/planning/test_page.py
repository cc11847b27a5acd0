"""The plan as a page: whole, well-formed, without a network."""

from __future__ import annotations

from xml.etree import ElementTree

from pipeline.planning.devices import load_device
from pipeline.planning.job import Job
from pipeline.planning.memory import PARTS
from pipeline.planning.page import COLOURS, render, speeds
from pipeline.planning.plan import Plan
from tests.support.planned_run import run_of

WORDS = ["parallel.pipeline_parallel_size=4", "training.micro_batch_size=1"]


def test_the_page_has_its_three_pictures_and_needs_no_other_file():
    cfg, shape = run_of(*WORDS, world_size=16)
    plan = Plan(Job.of(cfg, shape), load_device("h100"))
    page = render(cfg, plan, ["numbers < and &"])
    assert "http" not in page and "<script" not in page and "numbers &lt; and &amp;" in page
    svgs = [part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    memory, time, speed = (ElementTree.fromstring("<svg" + svg) for svg in svgs)
    assert len(memory.findall("rect")) == 4 * (len(PARTS) + 1)
    assert len(time.findall("rect")) == sum(s > 0 for s in plan.time.by_cause.values())
    assert len(speed.findall("circle")) == len(list(speeds(cfg, plan)))
    # What a reader would object to: values on the axes that are not round, and lines drawn on words.
    values = [text.text for text in memory.findall("text") if text.attrib["text-anchor"] == "end"]
    assert values == ["0", "20", "40", "60", "80"]
    for svg in (memory, speed):
        places = [(text.attrib["x"], text.attrib["y"]) for text in svg.findall("text")]
        assert len(set(places)) == len(places)
    dashes = speed.findall("polyline")[-2].attrib["points"].split()
    assert len({point.split(",")[1] for point in dashes}) == len(dashes), "it does not lie down"
    assert len(plan.time.by_cause) <= len(COLOURS)
    for rect in [*memory.findall("rect"), *time.findall("rect")]:
        x, y, width, height = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + width <= 860.2 and y + height <= 260.2


def test_speed_is_shown_where_the_rules_allow_it():
    """64 sequences over 4 stages: 1 to 64 copies of the model, so 4 to 256 devices."""
    cfg, shape = run_of(*WORDS, world_size=16)
    found = list(speeds(cfg, Plan(Job.of(cfg, shape), load_device("h100"))))
    assert [s.devices for s in found] == [4, 8, 16, 32, 64, 128, 256]
    rates = [s.tokens_per_s for s in found]
    assert rates == sorted(rates)
