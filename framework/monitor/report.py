"""Report: the picture of a run, as one HTML file that needs nothing else.

    run directory --read--> Run --render--> report.html: what it came to, curves over generations, incidents, snapshots,
                                            layouts over time, every decision, the config

Rule of this file: it reads what `run_dir.py` documents and copes with what is missing, since a run may be going on, or
may have been killed. `render` is a pure function of what was read.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from framework import run_dir
from framework.monitor.progress import duration, short
from framework.monitor.report_charts import Band, Mark, Point, bar_chart, lanes, line_chart

TONES = 8
PARTS = ("detect", "abort", "plan", "muster", "restore", "first_step")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory holds: all rows, those that counted, events, config, and the summary if there is one."""

    name: str
    rows: tuple[dict[str, Any], ...]
    counted: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None


def read(path: str | Path) -> Run:
    """Read a run directory. Raises ValueError if there is no run in it."""
    rows = run_dir.metric_rows(path)
    last = {row["step"]: row for row in rows}
    return Run(
        name=Path(path).resolve().name,
        rows=tuple(rows),
        counted=tuple(last[step] for step in sorted(last)),
        events=tuple(run_dir.events(path)),
        config=run_dir.config(path),
        summary=run_dir.summary(path),
    )


def write(path: str | Path) -> Path:
    """Write `report.html` into a run directory and return its path."""
    file = Path(path) / "report.html"
    aside = file.with_name(".report.html")
    aside.write_text(render(read(path)), encoding="utf-8")
    aside.replace(file)
    return file


def render(run: Run) -> str:
    """The page."""
    style, script = ((HERE / f"report.{kind}").read_text() for kind in ("css", "js"))
    sections = (
        _header(run),
        _tiles(run),
        _curves(run),
        _incidents(run),
        _snapshots(run),
        _timeline(run),
        _log(run),
        _config(run),
    )
    body = "".join(sections)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(run.name)}</title>'
    foot = "<footer>Shaded stretches are generations: a new one begins with every plan. Red dots are steps that were done again.</footer>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head>\n'
        f"<body><main>{body}{foot}</main><script>{script}</script></body></html>\n"
    )


def incidents(run: Run) -> list[dict[str, Any]]:
    """The incidents, from the summary, or from the events of a run that has none yet."""
    if run.summary is not None and "incidents" in run.summary:
        return list(run.summary["incidents"])
    return [event["incident"] for event in run.events if "incident" in event]


def generations(run: Run) -> list[Band]:
    """The stretches of steps that each generation took and that counted, toned by layout."""
    tones = _tones(run)
    bands: list[Band] = []
    for row in run.counted:
        generation, layout = row.get("generation", 1), str(row.get("layout", ""))
        label = f"{generation}: {layout}"
        if bands and bands[-1].label == label:
            bands[-1] = Band(bands[-1].start, row["step"], label, bands[-1].tone)
        else:
            start = bands[-1].stop if bands else row["step"]
            bands.append(Band(start, row["step"], label, tones.get(layout, 0)))
    return bands


def _tones(run: Run) -> dict[str, int]:
    """A colour for each layout, in order of appearance."""
    layouts = dict.fromkeys(str(row.get("layout", "")) for row in run.rows)
    return {layout: i % TONES for i, layout in enumerate(layouts)}


def _marks(run: Run) -> list[Mark]:
    return [
        Mark(float(incident.get("step", 0)), str(i), f"{incident.get('kind')}: {incident.get('evidence', '')}")
        for i, incident in enumerate(incidents(run), 1)
        if incident.get("step") is not None
    ]


def _header(run: Run) -> str:
    status = str(run.summary["status"]) if run.summary is not None else "no summary yet"
    pill = f'<span class="pill {escape(status)}">{escape(status.replace("_", " "))}</span>'
    reason = str((run.summary or {}).get("reason") or "")
    return f"<header><h1>{escape(run.name)}</h1>{pill}<p>{escape(reason)}</p></header>"


def _tiles(run: Run) -> str:
    summary, last = run.summary or {}, run.counted[-1] if run.counted else {}
    times = [row["step_time_s"] for row in run.counted if row.get("step_time_s")]
    rates = [row["tokens_per_s"] for row in run.counted if row.get("tokens_per_s")]
    wall = run.events[-1]["time"] - run.events[0]["time"] if run.events else None
    digest = summary.get("state_sha256")
    tiles = {
        "steps": f"{last.get('step', 0)} / {_at(run.config, 'optim', 'num_steps')}",
        "training loss": _figure(last.get("loss")),
        "validation loss": _figure(summary.get("val_loss")),
        "median step": f"{statistics.median(times) * 1e3:.0f} ms" if times else "–",
        "tokens per second": short(statistics.median(rates)) if rates else "–",
        "samples": short(summary["samples"]) if summary.get("samples") else "–",
        "layout": str(summary.get("layout") or last.get("layout") or "–"),
        "generations": str(summary.get("generations") or last.get("generation") or "–"),
        "incidents": str(len(incidents(run))),
        "goodput": f"{summary['goodput']:.1%}" if summary.get("goodput") is not None else "–",
        "wall clock": duration(wall) if wall is not None else "–",
        "state digest": str(digest)[:12] if digest else "–",
    }
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>' for name, value in tiles.items())
    return f'<section class="tiles">{"".join(cells)}</section>\n'


def _curves(run: Run) -> str:
    bands, marks = generations(run), _marks(run)
    counted = {id(row) for row in run.counted}
    again = [row for row in run.rows if id(row) not in counted]
    return "<h2>Training</h2>" + "".join(
        (
            line_chart(
                _points(run.counted, "loss"),
                title="Loss",
                unit="nats per token, log scale, by step; circles: held-out",
                bands=bands,
                marks=marks,
                dots=_points(again, "loss"),
                stars=_points(run.counted, "val_loss"),
                log=True,
                height=300,
            ),
            line_chart(
                _points(run.counted, "step_time_s", 1e3),
                title="Step time",
                unit="ms, log scale, by step",
                bands=bands,
                marks=marks,
                log=True,
                height=220,
            ),
            line_chart(
                _points(run.counted, "grad_norm"),
                title="Gradient norm",
                unit="before clipping, by step",
                bands=bands,
                height=200,
            ),
        )
    )


def _incidents(run: Run) -> str:
    found = incidents(run)
    if not found:
        return "<h2>Incidents</h2><p class='none'>none</p>"
    heads = ("", "what", "evidence and decision", "layout", "state from", "steps lost", "seconds")
    names = "".join(f"<th{' class=num' if name in ('steps lost',) else ''}>{name}</th>" for name in heads)
    rows = "".join(_incident(i, incident) for i, incident in enumerate(found, 1))
    legend = "".join(f'<i class="c{i}"></i>{part.replace("_", " ")}' for i, part in enumerate(PARTS))
    return (
        f'<h2>Incidents</h2><div class="card"><table><tr>{names}</tr>{rows}</table></div><p class="legend">{legend}</p>'
    )


def _incident(number: int, incident: Mapping[str, Any]) -> str:
    who = [f"rank {', '.join(map(str, incident['ranks']))}"] if incident.get("ranks") else []
    who += [", ".join(map(str, incident["nodes"]))] if incident.get("nodes") else []
    before, after = incident.get("layout_before") or "–", incident.get("layout_after") or "–"
    decoded = incident.get("bytes_decoded") or 0
    cells = (
        f'<td><span class="n">{number}</span></td>',
        f"<td><b>{escape(str(incident.get('kind', '')))}</b><small>{escape(', '.join(who))}</small>"
        f"<small>step {incident.get('step', '–')}</small></td>",
        f"<td>{escape(str(incident.get('evidence', '')))}<small>{escape(str(incident.get('decision', '')))}</small></td>",
        f"<td>{escape(before)}{f' → {escape(after)}' if after != before else ''}</td>",
        f"<td>{escape(str(incident.get('tier') or '–'))}<small>{short(decoded) + 'B decoded' if decoded else ''}</small></td>",
        f'<td class="num">{incident.get("steps_lost", "–")}</td>',
        f"<td>{_parts(incident)}</td>",
    )
    return f"<tr>{''.join(cells)}</tr>"


def _parts(incident: Mapping[str, Any]) -> str:
    """How long it took, as a bar of its parts and as numbers."""
    seconds = {part: float(incident.get(f"{part}_s") or 0.0) for part in PARTS}
    total = float(incident.get("total_s") or sum(seconds.values()))
    scale = 100 / max(sum(seconds.values()), 1e-9)
    bars = "".join(f'<i class="c{i}" style="width:{s * scale:.1f}%"></i>' for i, s in enumerate(seconds.values()))
    words = ", ".join(f"{part.replace('_', ' ')} {s:.2f}" for part, s in seconds.items() if s >= 0.005)
    return f'<b>{total:.2f} s</b><div class="parts">{bars}</div><small>{words}</small>'


def _snapshots(run: Run) -> str:
    taken = [event for event in run.events if event["kind"] == "snapshot" and not event.get("skipped")]
    if not taken:
        return ""
    bands = generations(run)
    bars = bar_chart(_points(taken, "bytes", 1e-6), title="Snapshots", unit="MB kept, by step", bands=bands)
    stalls = _points(taken, "stall_ms")
    chart = (
        bar_chart(stalls, title="Stall", unit="ms that a step waited for its snapshot", bands=bands) if stalls else ""
    )
    return f"<h2>Snapshots</h2>{bars}{chart}"


def _timeline(run: Run) -> str:
    """Which layout was at work when, and the gaps between."""
    if not run.events:
        return ""
    began, ended = run.events[0]["time"], run.events[-1]["time"]
    tones = _tones(run)
    work, gaps = [], []
    starts = [event for event in run.events if event["kind"] == "crew"]
    plans = {event["generation"]: event for event in run.events if event["kind"] == "plan"}
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        generation = start["generation"]
        stop = _stop(run, generation, ended)
        layout = str(plans.get(generation, start).get("layout", ""))
        work.append(Band(start["time"] - began, stop - began, f"{generation}: {layout}", tones.get(layout, 0)))
        if following is not None:
            gaps.append(Band(stop - began, following["time"] - began, "", 2))
    troubles = [event for event in run.events if "incident" in event]
    marks = [Mark(event["time"] - began, str(i), str(event.get("reason", ""))) for i, event in enumerate(troubles, 1)]
    return lanes(
        [("at work", work), ("regrouping", gaps)], marks, title="Layouts over time", unit="seconds since the start"
    )


def _stop(run: Run, generation: int, ended: float) -> float:
    """When a generation stopped working: its trouble, or the run's end."""
    over = ("finished", "failed")
    times = [
        event["time"]
        for event in run.events
        if event["generation"] == generation
        and (event["kind"] in over or (event["kind"] == "trouble" and "ranks" in event))
    ]
    later = [event["time"] for event in run.events if event["generation"] > generation]
    return float(min([*times[:1], *later[:1], ended]))


def _log(run: Run) -> str:
    began = run.events[0]["time"] if run.events else 0.0
    rows = "".join(
        f'<tr><td class="num">{event["time"] - began:.2f} s</td><td class="num">{event.get("step", "")}</td>'
        f'<td class="num">{event.get("generation", "")}</td><td class="kind {escape(event["kind"])}">{escape(event["kind"])}</td>'
        f"<td>{escape(str(event.get('reason', '')))}</td></tr>"
        for event in run.events
        if event["kind"] != "snapshot"
    )
    names = '<tr><th class="num">time</th><th class="num">step</th><th class="num">generation</th><th>kind</th><th>reason</th></tr>'
    return f'<h2>Decisions</h2><details open><summary>every decision, with its reason</summary><div class="card"><table>{names}{rows}</table></div></details>'


def _config(run: Run) -> str:
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
    return f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"


def _points(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[Point]:
    return [(float(row["step"]), float(row[key]) * factor) for row in rows if isinstance(row.get(key), int | float)]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _at(values: Mapping[str, Any], *keys: str) -> Any:
    found: Any = values
    for key in keys:
        found = found.get(key, {}) if isinstance(found, Mapping) else {}
    return "–" if found == {} else found
