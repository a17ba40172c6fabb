"""The report shows what the run directory says, needs no network, and copes with runs that are cut short."""

import html.parser
import json
import math
import random
import re

import pytest

from framework.monitor import report
from framework.monitor.report_charts import Scale, bar_chart, line_chart, log_ticks, ticks
from framework.run_dir import RunDir

NODE_LOSS = {
    "kind": "node_loss",
    "ranks": [1],
    "nodes": ["node1"],
    "evidence": "node1 gone with all its processes",
    "step": 180,
    "detected_at": 1_800_000_040.0,
    "decision": "use all that lives: layout 1x3x1 on 3 nodes instead of 2x2x1; state of step 176 from parity",
    "layout_before": "2x2x1",
    "layout_after": "1x3x1",
    "tier": "parity",
    "steps_lost": 4,
    "detect_s": 1.2,
    "abort_s": 0.31,
    "plan_s": 0.02,
    "muster_s": 0.4,
    "restore_s": 0.9,
    "first_step_s": 0.25,
    "total_s": 3.1,
    "bytes_decoded": 5_200_000,
}
HANG = NODE_LOSS | {
    "kind": "hang",
    "ranks": [2],
    "evidence": "does not answer since <4.2 s> & counting",
    "step": 420,
    "layout_before": "1x3x1",
    "layout_after": "2x2x1",
    "decision": "grow: node1 came back",
    "tier": "local",
    "steps_lost": 0,
    "bytes_decoded": 0,
}


def make_run(path, *, num_steps=600, ended=True):
    """A run of three generations with two incidents, in the documented format."""
    draw, run, now = random.Random(0), RunDir(path), 1_800_000_000.0
    run.write_config({"seed": 0, "model": {"dim": 128}, "optim": {"num_steps": num_steps}, "note": "<b>&"})

    def event(kind, step, generation, reason, **fields):
        row = {"time": now, "kind": kind, "step": step, "generation": generation, "reason": reason}
        with (path / "events.jsonl").open("a") as file:
            file.write(json.dumps(row | fields) + "\n")

    for generation, first, last, layout, incident in (
        (1, 1, 180, "2x2x1", NODE_LOSS),
        (2, 177, 420, "1x3x1", HANG),
        (3, 421, num_steps, "2x2x1", None),
    ):
        event("plan", first - 1, generation, f"layout {layout}", layout=layout)
        now += 1.5
        event("crew", first - 1, generation, "4 workers on 4 nodes")
        for step in range(first, last + 1):
            took = (0.21 if layout == "2x2x1" else 0.29) * draw.uniform(0.93, 1.1)
            now += took
            loss = 1.25 + 4.3 * math.exp(-step / 130) + draw.gauss(0, 0.04)
            row = {"step": step, "loss": loss, "grad_norm": abs(draw.gauss(0.6, 0.1)) + 2 / step, "lr": 1e-3}
            row |= {"tokens": step * 4096, "samples": [16 * (step - 1), 16 * step - 1], "step_time_s": took}
            run.metric(row | {"tokens_per_s": 4096 / took, "generation": generation, "layout": layout})
            if step % 20 == 0:
                fields = {"bytes": 10.4e6 * draw.uniform(0.99, 1.01), "stall_ms": draw.uniform(0, 1.5)}
                event("snapshot", step, generation, "protected", **fields)
        if incident is not None:
            event("trouble", last, generation, incident["evidence"], ranks=incident["ranks"], nodes=["node1"])
            now += 2.5
            event("resized", last, generation + 1, incident["decision"], incident=incident)
    if ended:
        summary = {"status": "finished", "reason": "", "steps": num_steps, "final_loss": 1.29, "val_loss": 1.3127}
        summary |= {"layout": "2x2x1", "generations": 3, "state_sha256": "9f" * 32, "goodput": 0.962}
        run.write_summary(summary | {"samples": num_steps * 16, "incidents": [NODE_LOSS, HANG]})
        event("finished", num_steps, 3, "finished")
    return path


class Page(html.parser.HTMLParser):
    """Text, tags, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.links = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_what_happened_and_stands_alone(tmp_path):
    file = report.write(make_run(tmp_path))
    text = file.read_text()
    page = Page(text)
    assert page.open == [] and page.links == [] and "@import" not in text and "url(" not in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert page.tags.count("svg") == 6 and page.tags.count("table") == 2
    for words in (
        "finished",
        "600 / 600",
        "1.313",
        "96.2%",
        "9f9f9f9f9f9f",
        "node1 gone with all its processes",
        "5.2MB",
    ):
        assert words in page.text, words
    assert "instead of 2x2x1; state of step 176 from parity" in page.text
    assert "does not answer since <4.2 s> & counting" in page.text, "what a run says is text, never markup"
    assert "<b>&" in page.text


def test_a_run_that_goes_on_has_a_report_with_the_incidents_so_far(tmp_path):
    run = report.read(make_run(tmp_path, ended=False))
    assert run.summary is None and [i["kind"] for i in report.incidents(run)] == ["node_loss", "hang"]
    page = Page(report.render(run))
    assert "no summary yet" in page.text and "node_loss" in page.text


def test_a_run_that_died_before_its_first_step_has_a_report(tmp_path):
    RunDir(tmp_path).write_config({"optim": {"num_steps": 5}})
    page = Page(report.render(report.read(tmp_path)))
    assert "nothing was recorded" in page.text and "0 / 5" in page.text
    with pytest.raises(ValueError, match="must be a run directory"):
        report.read(tmp_path / "none")


def test_generations_are_the_stretches_that_counted(tmp_path):
    bands = report.generations(report.read(make_run(tmp_path)))
    assert [(b.start, b.stop, b.label) for b in bands] == [
        (1, 176, "1: 2x2x1"),
        (176, 420, "2: 1x3x1"),
        (420, 600, "3: 2x2x1"),
    ]
    assert bands[0].tone == bands[2].tone != bands[1].tone


def test_a_million_steps_make_a_small_chart_that_keeps_the_extremes():
    points = [(float(x), 1.0) for x in range(100_000)]
    points[51_234] = (51_234.0, 9.0)
    drawing = line_chart(points, title="t", unit="u")
    assert len(drawing) < 60_000
    ys = [float(y) for y in re.search(r'class="range" d="M([^"]*)Z"', drawing)[1].replace("L", " ").split()[1::2]]
    assert max(ys) - min(ys) > 150


def test_ticks_are_round_and_within():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.013, 0.097) == [0.02, 0.04, 0.06, 0.08]
    assert ticks(3, 3) == [3]
    assert log_ticks(0.9, 30) == [1, 2, 5, 10, 20]
    assert len(log_ticks(1.21, 1.29)) >= 2


def test_scales_map_ends_to_ends():
    linear, log = Scale(0, 10, 100, 200), Scale(1, 100, 200, 0, log=True)
    assert (linear(0), linear(5), linear(10)) == (100, 150, 200)
    assert (log(1), log(10), log(100)) == (200, 100, 0)
    assert bar_chart([(1.0, 0.0)], title="t", unit="u").count('class="bar"') == 1
