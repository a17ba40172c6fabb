"""Journal: the history of a run as the controller writes it: rows, events, incidents, the last word.

    what ranks say, what is decided  ->  files of the run directory + sinks + whoever follows the run
                                     ->  the few facts the controller asks back: newest step, step time, silence

Opened again after the controller was lost, it reads its own files and goes on counting.

Rule of this file: it writes down. It decides nothing.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from framework import run_dir
from framework.config import Config, plain
from framework.control.incident import Incident, Recovery, Trouble
from framework.monitor.prometheus import Gauge
from framework.monitor.sinks import make_sinks
from framework.monitor.startup import Startup
from framework.monitor.telemetry import TOGETHER_S, Telemetry
from framework.plan import Plan
from framework.run_dir import RunDir

FOLLOWED = 20_000


class Journal:
    """The one writer of a run directory."""

    def __init__(
        self, config: Config, run_id: str, *, gauge: Callable[[], Gauge], startup: Startup | None = None
    ) -> None:
        """`gauge` opens what keeps Prometheus gauges. `startup`: what has been measured of the run's start so far."""
        self._dir = RunDir(config.run_dir)
        if not (self._dir.path / "config.yaml").exists():
            self._dir.write_config(plain(config))
        sinks = make_sinks(config.monitor, directory=config.run_dir, run_id=self._dir.tracking_id, config=plain(config), gauge=gauge)
        self._telemetry = Telemetry(sinks, together_s=TOGETHER_S)
        self._written_at = max((f.stat().st_mtime for f in self._dir.path.glob("*.jsonl")), default=time.time())
        self._rows = run_dir.metrics(config.run_dir)
        events = run_dir.events(config.run_dir)
        self._startup = None if events else startup
        self.generation = max((int(e["generation"]) for e in events), default=0)
        self._incidents: list[dict[str, Any]] = [e["incident"] for e in events if "incident" in e]
        self._open: Incident | None = None
        self._opened = 0.0
        self._recoveries: dict[int, Recovery] = {}
        self._step_times: deque[float] = deque(maxlen=50)
        self._last_step_at = 0.0
        self._stepped: set[int] = set()
        self._began = float(events[0]["time"]) if events else time.time()
        self._said: deque[tuple[int, dict[str, Any]]] = deque(maxlen=FOLLOWED)
        self._number = 0
        self._failure = ""
        self._lock = threading.Lock()
        self.losses = {int(e["step"]): float(e["val_loss"]) for e in events if e["kind"] == "evaluation"}
        self._val_loss: float | None = None
        self.plan: Plan | None = None
        self.tolerance = 0
        self._saw = 0
        self.vitals: dict[str, float] = {}
        self.checkpoint_age_s: Callable[[], float | None] = lambda: None

    # facts

    @property
    def logs(self) -> str:
        """Where the logs of processes go."""
        return str(self._dir.logs)

    @property
    def reached(self) -> int:
        """The newest step that was ever taken."""
        return int(self._rows[-1]["step"]) if self._rows else 0

    @property
    def step_s(self) -> float:
        """The median step time lately; 0 while unknown."""
        return statistics.median(self._step_times) if self._step_times else 0.0

    @property
    def stands_at(self) -> int:
        """The step that the crew is to go on from: what was reached, or where a run begins that resumes another one."""
        return max(self.reached, self.plan.source.step if self.plan is not None else 0)

    @property
    def silent_s(self) -> float:
        """Seconds since anything was written down, by this life of the controller or the one before."""
        return max(0.0, time.time() - self._written_at)

    def stepped(self, generation: int) -> bool:
        """Whether a generation has taken a step."""
        return generation in self._stepped

    def quiet_s(self, began: float) -> float:
        """Seconds since the last sign of progress, at most since `began` (monotonic)."""
        return time.monotonic() - max(self._last_step_at, began)

    def since(self, number: int) -> dict[str, Any]:
        """Rows and events that came after `number`, for whoever follows the run."""
        with self._lock:
            fresh = [item for item in self._said if item[0] > number]
        return {"last": fresh[-1][0] if fresh else number, "said": [item for _, item in fresh]}

    # writing

    def event(self, kind: str, *, reason: str, step: int | None = None, **fields: Any) -> None:
        """One decision or happening."""
        at = self.reached if step is None else step
        row = self._dir.event(kind, step=at, generation=self.generation, reason=reason, **fields)
        self._telemetry.event(row)
        self._tell({"event": row})
        self._watch_disk()

    def planned(self, plan: Plan, *, seconds: float, limits: Sequence[str] = ()) -> None:
        """A generation begins. `limits` say what its snapshots cannot survive."""
        self._mark("controller and plan")
        self.generation, self.plan = plan.generation, plan
        if self._open is not None:
            self._open.plan_s, self._open.decision = seconds, plan.reason
            self._open.layout_after = str(plan.layout)
            self._open.steps_lost = max(0, max(self.reached, self._saw) - plan.source.step)
        self._saw = 0
        self.event(
            "plan",
            reason="; ".join([plan.reason, *limits]),
            step=plan.source.step,
            layout=str(plan.layout),
            schedule=plan.schedule,
            num_microbatches=plan.num_microbatches,
            seats=[seat.worker for seat in plan.seats],
            tolerate=plan.tolerate,
            limits=list(limits),
            tier=plan.source.tier,
            options=[str(option) for option in plan.options],
            plan_s=seconds,
        )

    def mustered(self, plan: Plan, *, seconds: float, started: Mapping[str, float], device: str) -> None:
        """The crew of a plan has been called together."""
        self._mark("processes")
        self._recoveries = {}
        if self._open is not None:
            self._open.muster_s = seconds
        slowest = max(started.values(), default=0.0)
        reason = f"{plan.layout.world} workers on {len(plan.nodes)} nodes, {len(started)} processes started in {slowest:.1f} s; {device}"
        self.event("crew", reason=reason, step=plan.source.step, muster_s=seconds, started=dict(started))

    def take(self, said: Iterable[Mapping[str, Any]], plan: Plan) -> None:
        """What ranks have said since the last time."""
        for item in said:
            match item.get("event"):
                case None:
                    self._row(item, plan)
                case "restored":
                    self._restored(int(item["rank"]), item["recovery"], plan)
                case "evaluation":
                    self._val_loss = self.losses[int(item["step"])] = float(item["val_loss"])
                    self.event("evaluation", reason=f"held-out loss {self._val_loss:.4f}", step=int(item["step"]), val_loss=self._val_loss)
                    self._telemetry.step(item)
                case "numerics":
                    self._numerics(item, plan)
                case kind:
                    fields = {k: v for k, v in item.items() if k not in ("event", "reason", "step", "generation", "kind")}
                    self.event(str(kind), reason=str(item["reason"]), step=int(item["step"]), **fields)

    def trouble(self, trouble: Trouble, plan: Plan, *, likely_cause: str = "") -> None:
        """A generation has ended before its time; an incident begins. `likely_cause`: a line out of the ranks' logs."""
        self._close_incident()
        self._open = Incident(trouble, str(plan.layout), detect_s=trouble.silent_s)
        self._opened = time.monotonic()
        self._open.extra["likely_cause"] = likely_cause
        reason = str(trouble) + (f"; likely cause in the logs: {likely_cause}" if likely_cause else "")
        self.event("trouble", reason=reason, cause=trouble.kind, ranks=trouble.ranks, nodes=trouble.nodes)

    def inherited(self, trouble: Trouble) -> None:
        """The controller was lost, and this is its next life; an incident begins."""
        layout = self._rows[-1].get("layout") if self._rows else None
        self._open = Incident(trouble, str(layout or ""), detect_s=trouble.silent_s)
        self._opened = time.monotonic()
        self.event("trouble", reason=str(trouble), cause=trouble.kind)

    def saw(self, step: int) -> None:
        """A step that was taken, although nobody is left to tell of it."""
        self._saw = max(self._saw, step)

    def adopt(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that were not told before their teller was lost; those that are known already are left out."""
        for row in rows:
            newest = self._rows[-1] if self._rows else {"generation": 0, "step": 0}
            if (row["generation"], row["step"]) > (newest["generation"], newest["step"]):
                self._enter(row)

    def cleared(self, *, seconds: float, stuck: Sequence[int]) -> None:
        """Everybody is out of the old generation."""
        if self._open is not None:
            self._open.abort_s = seconds
            if stuck:
                self._open.extra["killed_ranks"] = list(stuck)

    def summary(self, status: str, *, reason: str, closing: Mapping[str, Any], exit_code: int) -> dict[str, Any]:
        """Write the last word of the run, and return it."""
        if self._open is not None and status == "finished":  # it happened after the last step: there is no new one to wait for
            self._open.total_s = self._open.total_s or time.monotonic() - self._opened + self._open.detect_s
            self._close_incident("recovered")
        self._close_incident()
        wall = max(time.time() - self._began, 1e-9)
        last = self._rows[-1] if self._rows else None
        values = {
            "status": status,
            "reason": reason,
            "exit_code": exit_code,
            "steps": self.reached,
            "final_loss": last["loss"] if last else None,
            "val_loss": self._val_loss,
            "layout": str(self.plan.layout) if self.plan else None,
            "generations": self.generation,
            "samples": int(last["samples"][1]) + 1 if last else 0,
            "goodput": min(1.0, self._counted_s() / wall),
            "wall_s": wall,
            "incidents": self._incidents,
        } | dict(closing)
        try:
            self._dir.write_summary(values)
        except OSError as error:
            self.event("alarm", reason=f"run_dir: {self._dir.path}/summary.json could not be written: {error.strerror}")
        kind = "finished" if status in ("finished", "interrupted") else "failed"
        losses = "".join(f", {name} {values[name]:.4f}" for name in ("final_loss", "val_loss") if values[name] is not None)
        how = "" if status == kind else f"{status} "
        self.event(kind, reason=reason or f"{how}after {self.reached} steps in {wall:.0f} s{losses}", status=status)
        return values

    def close(self) -> None:
        """Let the sinks write what they have."""
        self._close_incident()
        self._telemetry.close()
        self._dir.close()

    # private

    def _row(self, row: Mapping[str, Any], plan: Plan) -> None:
        self._enter(row)
        self._last_step_at = time.monotonic()
        if plan.generation in self._stepped:  # the first step of a generation compiles and connects
            self._step_times.append(float(row["step_time_s"]))
        elif self._open is not None:
            self._recovered(float(row["step_time_s"]))
        self._started(float(row["step_time_s"]))
        self._stepped.add(plan.generation)
        self._conclude(plan)

    def _enter(self, row: Mapping[str, Any]) -> None:
        """Write a row down and show it. Of a step that is done again, the last row counts."""
        row = {**row, "tolerance": self.tolerance}
        if (age_s := self.checkpoint_age_s()) is not None:
            row["checkpoint_age_s"] = age_s
        self._dir.metric(row)
        self._watch_disk()
        vitals, self.vitals = self.vitals, {}  # told once: between two of them nothing is known of machines
        self._telemetry.step(row, vitals)
        run_dir.enter(self._rows, dict(row))
        self._tell({"row": dict(row)})

    def _watch_disk(self) -> None:
        """Tell when the disk takes no rows any more, and when it has taken all that waited."""
        failure, self._failure = self._failure, self._dir.failure
        if self._failure and not failure:
            self.event("alarm", reason=f"run_dir: {self._failure}; make room there; training goes on, and rows wait until they can be written")
        elif failure and not self._failure:
            self.event("alarm", reason="run_dir: all rows that had to wait are written")

    def _mark(self, part: str) -> None:
        if self._startup is not None:
            self._startup.mark(part)

    def _started(self, first_step_s: float) -> None:
        """The first step of a new run: say what the start consisted of."""
        startup, self._startup = self._startup, None
        if startup is None:
            return
        startup.mark("hand-over")
        told = self._recoveries.values()
        inner = {name: max((getattr(r, f"{name}_s") for r in told), default=0.0) for name in ("connect", "build", "restore")}
        startup.divide("hand-over", inner | {"first step": first_step_s})
        self.event("startup", reason=startup.words(), parts=dict(startup.parts), total_s=startup.total_s)

    def _numerics(self, item: Mapping[str, Any], plan: Plan) -> None:
        """A step was not believed: told, and an incident of its own, over as soon as it began."""
        step, reason, ranks = int(item["step"]), str(item["reason"]), tuple(item["ranks"])
        nodes = tuple(dict.fromkeys(plan.seats[rank].node for rank in ranks))
        incident = Incident(Trouble("nan", ranks, nodes, reason, step, time.time()), str(plan.layout))
        incident.decision, incident.layout_after, incident.tier = str(item["action"]), str(plan.layout), "local"
        record = incident.plain()
        self._incidents.append(record)
        fields = {"cause": "nan", "ranks": list(ranks), "nodes": list(nodes), "action": item["action"]}
        self.event("verdict", reason=reason, step=step, incident=record, loss=item["loss"], grad_norm=item["grad_norm"], **fields)

    def _restored(self, rank: int, recovery: Recovery, plan: Plan) -> None:
        self._recoveries[rank] = recovery
        if len(self._recoveries) == plan.layout.world and self._open is not None:
            self._open.restored(list(self._recoveries.values()))
        self._conclude(plan)

    def _recovered(self, first_step_s: float) -> None:
        """The first new step has been taken."""
        assert self._open is not None
        self._open.first_step_s = first_step_s
        self._open.total_s = time.monotonic() - self._opened + self._open.detect_s

    def _conclude(self, plan: Plan) -> None:
        """The incident is over when a new step was taken and every rank has told how it got its state."""
        if self._open is None or not self._open.total_s or len(self._recoveries) < plan.layout.world:
            return
        changed = self._open.layout_before not in ("", self._open.layout_after)
        self._close_incident("resized" if changed else "recovered")

    def _close_incident(self, kind: str = "trouble") -> None:
        incident, self._open = self._open, None
        if incident is None:
            return
        record = incident.plain()
        self._incidents.append(record)
        reason = incident.decision or f"unresolved: {incident.trouble}"
        self.event(kind, reason=reason, incident=record)

    def _counted_s(self) -> float:
        """Seconds of the steps that counted."""
        return sum(float(row["step_time_s"]) for row in self._rows)

    def _tell(self, item: dict[str, Any]) -> None:
        with self._lock:
            self._number += 1
            self._said.append((self._number, item))
