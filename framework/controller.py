"""Controller: the loop of a run. Look, plan, muster a crew, watch it; on trouble, do the same again.

            +--------------------------------------------------------------+
            v                                                              |
    look (nodes, processes, vaults) -> plan (pure) -> muster -> watch -> trouble: clear
                                         |                        |
                                      refused                  finished
                                         v                        v
                                    failed, 3 or 4            finished, 0

Starting, resuming and recovering are one path: starting is recovering from nothing. The controller keeps nothing
that it could not find again: the processes by their names, the state and the newest generation in the vaults, the
history in the run directory. So it may itself be killed and started again at any moment.

Rule of this file: it acts on decisions of `plan.py` and `watch.py`; the bytes are the vaults' and the workers' matter.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from framework.cluster.cluster import CallError, Cluster, wait_all
from framework.cluster.nodes import ClusterError
from framework.cluster.rendezvous import Rendezvous
from framework.config import decode
from framework.control.broken_ways import BrokenWays
from framework.control.closing import Closing
from framework.control.crew import Crew, muster
from framework.control.durable import Durable
from framework.control.incident import HOLD, Trouble
from framework.control.inventory import LOOK_S, Inventory, Stopped
from framework.control.journal import Journal
from framework.control.memory import Memory
from framework.control.pool import Pool, PoolError
from framework.control.watch import Limits, Sight, apart, judge, notice
from framework.monitor.prometheus import Gauge, by_name, endpoint
from framework.monitor.startup import Startup
from framework.monitor.vitals import Vitals
from framework.plan import (
    Place,
    Plan,
    Refused,
    Source,
    Unfit,
    choose,
    expected_s,
    held_by_all,
    make_plan,
    options,
    stay,
)
from framework.planning.devices import decide
from framework.planning.planner import Planner
from framework.trouble.distrust import Distrust
from framework.trouble.failures import MAX_FAILURES, Failures
from framework.trouble.preflight import preflight
from framework.trouble.response import Response
from framework.trouble.sentinel import Sentinel, lend_rings, record_at_once, settings_of
from framework.trouble.weighing import Costs, Outlook, Tried
from parallel.layout import Layout

KEEP_S = 0.5
ABORT_S = 12.0  # who has been severed is out at once: who is not out after this is stuck
STOP_S = 60.0
APART_ABORT_S = 3.0  # who connects over a dead way is not out sooner than the way is back
ALONE_LOOK_S = 3.0
ROWS_S = 3.0
ASKED_S = 0.1
CALM_LOOK_S = 0.5  # between two looks while all step and nobody is suspected of anything; a process that ends is seen at once
SILENT_S = 1.0  # who says nothing for so long, and was asked, may be gone with its machine


class Controller:
    """The run's one decider, hosted in an actor. `run` blocks until the end; `progress` and `stop` may be called meanwhile."""

    def __init__(self, *, config: dict[str, Any], run_id: str, secret: str, startup: dict[str, Any]) -> None:
        self._run_id = run_id
        self._cluster = Cluster.inside(run_id)
        self._device = decide(decode(config), gpus_per_worker=self._cluster.gpus_per_worker)
        config = config | {"cluster": config["cluster"] | {"device": self._device.kind}}  # decided once, for all processes
        self._config = decode(config)
        self._journal = Journal(self._config, run_id, gauge=self._gauge, startup=Startup(**startup))
        self._planner = Planner(self._config)
        self._rendezvous = Rendezvous(self._cluster.own_ip())
        self._memory = Memory(self._config, run_id=run_id, secret=secret, atlas=self._planner.atlas)
        worker = {"config": config, "run_id": run_id, "secret": secret}
        agent = {"run_id": run_id, "secret": secret}
        self._durable = Durable(self._config, run_id=run_id, losses=self._journal.losses)
        self._journal.checkpoint_age_s = lambda: self._durable.age_s
        self._specs = self._planner.atlas(Layout(), "1f1b").specs
        self._pool = Pool(self._cluster, logs=self._journal.logs, agent=agent, worker=worker)
        self._ways = BrokenWays(self._pool.agents)
        self._distrust = Distrust(journal=self._journal, memory=self._memory, durable=self._durable, agents=self._pool.agents)
        self._closing = Closing(
            self._config,
            cluster=self._cluster,
            journal=self._journal,
            memory=self._memory,
            durable=self._durable,
            pool=self._pool,
            specs=self._specs,
            keep=self._keep,
        )
        self._stop = threading.Event()
        self._inventory = Inventory(
            self._config,
            cluster=self._cluster,
            journal=self._journal,
            pool=self._pool,
            memory=self._memory,
            planner=self._planner,
            ways=self._ways,
            stopped=self._stop.is_set,
        )
        self._failures = Failures()
        self._mustered = bool(self._pool.workers)  # also in an earlier life
        self._summary: dict[str, Any] | None = None
        self._response: Response | None = None
        self._tried = Tried()
        self._held: tuple[Plan, int] | None = None  # the plan whose ranks have kept their state, and its step
        self._vitals = Vitals()
        self._answers_s: deque[float] = deque(maxlen=256)
        self._called, self._running = threading.Event(), threading.Lock()
        threading.Thread(target=self._run_alone, daemon=True, name="alone").start()

    def _gauge(self) -> Gauge:
        """Where Prometheus finds this run's gauges."""
        if self._cluster.control is not None:
            return endpoint(self._config.run_dir, self._cluster.own_ip())
        from framework.cluster.ray_metrics import gauges

        return by_name(gauges(self._run_id))

    def progress(self, since: int) -> dict[str, Any]:
        """Rows and events after number `since`, for whoever shows the run to a person."""
        return self._journal.since(since)

    def stop(self, reason: str) -> None:
        """End the run at the next step boundary, state kept."""
        self._journal.event("trouble", reason=f"asked to stop: {reason}", cause="stop")
        self._stop.set()

    def salvage(self, last: bool) -> None:
        """Begin to save the newest protected snapshot, and ask for another one: Ray's head is away, the loop waits for it, and the
        crew steps on.

        `last`: it stays away, so this is waited for, and what the crew has done without being heard is written down, too.
        """
        plan = self._journal.plan
        reporter = None if plan is None else self._pool.workers.get(plan.seats[0].worker)
        if plan is None or reporter is None:
            return
        for event in self._memory.poll():
            self._journal.event(**{"kind": "snapshot", **event})
        if (step := self._memory.protected) is not None and step > self._durable.reached:
            self._durable.begin(plan, step, self._pool.agents, self._specs)
        reporter.call("request_snapshot", plan.generation)
        if last:
            self._adopt()
            self._durable.finish()
            self._tell_saves()

    def run(self) -> dict[str, Any]:
        """The whole run. Returns the summary, `exit_code` included; called again, the same one."""
        self._called.set()
        with self._running:
            if self._summary is None:
                self._summary = self._whole_run()
            return self._summary

    def _run_alone(self) -> None:
        """Started again because the driver's machine was lost, nobody calls `run`: then the run is ended in order, by itself."""
        while not self._called.wait(ALONE_LOOK_S):
            if self._cluster.driver_is_gone():
                self.run()

    def _whole_run(self) -> dict[str, Any]:
        try:
            trouble = self._inherit()
            if trouble is None and self._config.cluster.preflight:
                self._inventory.await_first()
                nodes = [place.node for place in self._inventory.places()]
                preflight(self._config, nodes, cluster=self._cluster, pool=self._pool, journal=self._journal)
            while True:
                trouble = self._generation(trouble)
                if trouble is not None:
                    continue
                done = self._journal.reached >= self._config.optim.num_steps
                status = "finished" if done or not self._stop.is_set() else "interrupted"
                closing = self._closing.close_out(status)
                if not isinstance(closing, Trouble):
                    unsaved = str(closing.pop("unsaved", ""))
                    return self._end("failed" if unsaved and done else status, reason=unsaved, closing=closing)
                self._put_aside(closing)
                for node in closing.nodes:
                    self._pool.forget_agent(node)
                trouble = self._count(closing)
        except Stopped:
            return self._end("interrupted")
        except Unfit as refusal:
            return self._end("unfit", reason=str(refusal))
        except Refused as refusal:
            return self._end("no_progress" if isinstance(refusal, NoProgress) else "failed", reason=self._closing.last_word(refusal))
        except (ClusterError, CallError) as error:
            return self._end("failed", reason=self._closing.last_word(error))
        except Exception as error:  # a fault of ours: the run must not end without a word all the same
            traceback.print_exc()
            return self._end("failed", reason=f"a fault of holdfast, see logs/controller.log: {type(error).__name__}: {error}")
        finally:
            self._ways.close()
            self._pool.close()
            self._journal.close()
            if self._cluster.driver_is_gone():
                self._cluster.leave()

    def _generation(self, trouble: Trouble | None) -> Trouble | None:
        """One turn of the loop. Returns the trouble that ended it, or None when there is no more to do."""
        if self._stop.is_set() and self._journal.reached == 0:
            return None
        began = time.monotonic()
        plan = self._decide(trouble)
        self._journal.planned(plan, seconds=time.monotonic() - began, limits=self._memory.limits(plan))
        try:
            crew = self._muster(plan)
        except (PoolError, ClusterError) as error:
            return self._unmustered(plan, error)
        self._mustered = True
        self._response = self._respond(crew)
        try:
            ended = self._watch(crew)
        finally:
            self._response.close()
        if ended is not None and ended.kind == "node_loss":
            self._memory.lost |= set(ended.nodes)  # a frozen one would be waited for
        self._keep(plan, last=True)
        if ended is None or (self._stop.is_set() and crew.finished and self._held is None):
            return None
        self._clear(crew, ended)
        unreadable = any(view.how == "restore_failed" for view in crew.ended().values())
        if unreadable and ended.kind != "node_loss" and not self._memory.holders_gone():  # else the holders went, not the bytes
            self._distrust.failed(plan)
            return ended  # not counted: what failed is not tried again
        return self._count(ended)

    # look and plan

    def _inherit(self) -> Trouble | None:
        """Have the crew that an earlier life of this controller left at work end at a step boundary, and hold its state."""
        if not self._pool.workers:
            return None
        trouble = Trouble(
            "controller", (), (), "the controller was lost, and started again", self._journal.reached, time.time(),
            silent_s=self._journal.silent_s,
        )  # fmt: skip
        self._journal.inherited(trouble)
        began = time.monotonic()
        self._pool.weed()
        calls = {name: remote.call("leave") for name, remote in self._pool.started().items()}
        deadline = time.monotonic() + STOP_S
        told: dict[str, tuple[Plan, int]] = {}
        for name, call in calls.items():
            if not call.wait(max(0.0, deadline - time.monotonic())):
                self._pool.forget(name)
                continue
            with contextlib.suppress(CallError):
                if (held := call.result(0)) is not None:
                    told[name] = held
        self._held = held_by_all(told)
        self._adopt()
        self._journal.cleared(seconds=time.monotonic() - began, stuck=())
        return trouble

    def _adopt(self) -> None:
        """Take over from whoever lives the steps that were taken and not told before the teller, or this controller, was lost."""
        calls = [remote.call("rows") for remote in self._pool.started().values()]
        wait_all(calls, ROWS_S)
        for call in calls:
            if call.done():
                with contextlib.suppress(CallError):
                    self._journal.adopt(call.result(0))

    def _decide(self, trouble: Trouble | None) -> Plan:
        if trouble is None:
            self._inventory.await_first()
        places = self._inventory.enough_places()
        self._memory.look(self._pool.agents, apart=self._inventory.left_out)
        generation = max(self._memory.generation, self._journal.generation)
        held, self._held = self._held, None
        if held is not None and self._all_there(held[0], places):
            return stay(held[0], generation=generation, step=held[1], trouble=str(trouble))
        source = self._source()
        if source.tier == "memory" and self._memory.snapshot is not None:
            self._journal.adopt(self._memory.snapshot.extra.get("rows", ()))
        if self._journal.plan is not None:
            self._planner.measured(self._journal.plan.layout, self._journal.step_s)
        situation = self._planner.situation(
            places,
            source=source,
            generation=generation,
            overlap=self._memory.overlap() if source.tier == "memory" else None,
            trouble=trouble,
            seated=self._inventory.seated,
        )
        return make_plan(self._run_id, self._planner.wish(), situation)

    def _all_there(self, plan: Plan, places: Sequence[Place]) -> bool:
        """Whether every process of a plan may take its seat again."""
        usable = {place.node for place in places}
        return all(seat.node in usable and seat.worker in self._pool.workers for seat in plan.seats)

    def _source(self) -> Source:
        """Where the state comes from: the newest snapshot, else the newest checkpoint, else the seed.

        Raises Refused when steps were taken and nothing of them is left.
        """
        snapshot = self._memory.snapshot
        durable = self._durable.newest(than=None if snapshot is None else snapshot.step)
        if snapshot is not None and (durable is None or snapshot.step >= durable.step):
            return Source("memory", snapshot.step)
        if durable is not None:
            return durable
        if self._journal.reached == 0:
            return Source("fresh", 0)
        raise Refused(
            f"state lost: step {self._journal.reached} was reached, and no snapshot decodes ({self._memory.reasons or 'none is left'})"
        )

    # muster

    def _muster(self, plan: Plan) -> Crew:
        began = time.monotonic()
        took = self._pool.ensure([seat.worker for seat in plan.seats], timeout_s=self._config.cluster.start_timeout_s)
        self._inventory.tell_unready()
        self._memory.check_room(plan, self._pool.agents)
        order = self._memory.open(plan, self._pool.agents) | {
            "plan": plan,
            "store": self._rendezvous.address,
            "rings": lend_rings(plan, self._pool.agents),
            "record_at_once": record_at_once(plan, self._pool.agents),
            "reached": self._journal.reached,
        }
        crew = muster(
            plan,
            agents=self._pool.agents,
            order=order,
            workers=self._pool.workers,
            ping_period_s=self._config.detect.ping_period_s,
            answers_s=self._answers_s,
        )
        self._journal.mustered(plan, seconds=time.monotonic() - began, started=took, device=str(self._device))
        self._inventory.warm_spares(plan)
        return crew

    def _unmustered(self, plan: Plan, error: Exception) -> Trouble:
        """Why a crew could not be called together. A machine that nothing can be started on is left out, however often it was tried.

        Raises Unfit where it is so at the very start: then the user can mend it, and nothing is lost.
        """
        gone = [node for node in plan.nodes if not self._cluster.confirm(node)]
        at, misfit = (error.nodes, error.misfit) if isinstance(error, PoolError) else ((), "")
        if misfit and not self._mustered:
            raise Unfit(misfit) from error
        trouble = apart(plan, gone, str(error), step=plan.source.step, now=time.time(), nodes=at)
        self._put_aside(trouble)
        if misfit and not gone and self._dispensable(at[0]):
            self._inventory.evict(at, misfit)
            return trouble
        return self._count(trouble)

    # watch

    def _watch(self, crew: Crew) -> Trouble | None:
        """Until the crew has ended, well or badly. Returns the trouble, or None if there is nothing left to train."""
        assert self._response is not None
        leaving: Trouble | None = None
        kept = 0.0
        while True:
            self._journal.take(self._response.heard(crew.look(self._response.still_s(time.monotonic()))), crew.plan)
            if crew.finished or time.monotonic() - kept >= KEEP_S:
                kept = time.monotonic()
                self._keep(crew.plan)
                if self._durable.newly_requested():
                    crew.request_snapshot()
            if crew.finished:
                self._journal.take(crew.last_words(), crew.plan)
                if leaving is not None and leaving.kind == "preemption":  # meanwhile more of a node may have been told
                    leaving = notice(self._sight(crew), crew.plan) or leaving
                    if leaving.nodes and not self._inventory.places():
                        self.stop("every node was asked to leave")
                return self._conclude(crew, leaving)
            sight = self._sight(crew)
            trouble = judge(sight, crew.plan, self._limits(crew))
            if trouble is not None and not trouble.planned:
                self._journal.take(crew.last_words(sight.dead_nodes), crew.plan)
                return self._response.explained(trouble)
            trouble = self._response.look() or trouble
            if trouble is not None and not trouble.planned:
                self._journal.take(crew.last_words(sight.dead_nodes), crew.plan)
                return trouble
            holds = trouble is not None and trouble.remedy == HOLD
            if leaving is None or (holds and leaving.remedy != HOLD):  # who was asked to stop cannot keep the state there any more
                leaving = trouble or self._wish_to_leave(crew)
                if leaving is not None:
                    self._journal.event("trouble", reason=str(leaving), cause=leaving.kind)
                    (crew.request_hold if leaving.remedy == HOLD else crew.request_stop)()
            crew.wait(CALM_LOOK_S if leaving is None and self._is_calm(sight, crew.plan) else LOOK_S)

    def _is_calm(self, sight: Sight, plan: Plan) -> bool:
        """Whether there is nothing that a look could find sooner than the next step or verdict does."""
        assert self._response is not None
        silent = max(sight.silent_s.values(), default=0.0) > SILENT_S
        return not sight.ended and not silent and self._journal.stepped(plan.generation) and self._response.calm

    def _respond(self, crew: Crew) -> Response:
        wish = self._planner.wish()
        return Response(
            self._config,
            self._journal,
            crew.plan,
            self._pool.agents,
            sentinel=Sentinel(crew.plan, self._pool.agents, settings_of(self._config.detect)),
            request_test=crew.request_test,
            request_shares=crew.request_shares,
            without=lambda node: self._without(node, crew.plan),
            costs=Costs(wish.muster_s, wish.start_worker_s),
            tried=self._tried,
            ways=self._ways,
        )

    def _without(self, node: str, plan: Plan) -> Outlook:
        """What would become of a crew without one of its machines."""
        wish, places = self._planner.wish(), tuple(p for p in self._inventory.places() if p.node != node)
        situation = self._planner.situation(places, source=plan.source, generation=plan.generation)
        scored = options(wish, situation) if len(places) >= wish.min_nodes else ()
        if not scored:
            return Outlook(spare=False, ratio=None)
        best = choose(scored)
        return Outlook(best.layout == plan.layout, best.step_s / max(expected_s(plan.layout, wish, situation), 1e-9))

    def _keep(self, plan: Plan, *, last: bool = False) -> None:
        """Write down what became of snapshots, and have those that are due saved to storage."""
        for event in self._memory.poll(last=last):
            self._journal.event(**{"kind": "snapshot", **event})
            if event.get("protected") and self._durable.due(event["step"]):
                self._durable.begin(plan, event["step"], self._pool.agents, self._specs)
            if event.get("protected"):
                self._inventory.release(plan)
        self._journal.tolerance = self._memory.tolerance()
        self._tell_saves()
        self._journal.vitals |= self._vitals.poll(time.monotonic(), self._pool.agents, self._pool.workers)

    def _tell_saves(self) -> None:
        """What has come of saves to storage."""
        for saved in self._durable.poll():
            self._journal.event("checkpoint", **saved)
            if not saved["saved"]:
                self._journal.event("alarm", step=saved["step"], reason=f"checkpoint: {saved['reason']}", age_s=saved["age_s"])

    def _conclude(self, crew: Crew, leaving: Trouble | None) -> Trouble | None:
        outcomes = [view.outcome for view in crew.ranks if view.outcome is not None]
        if all(outcome["how"] == "finished" for outcome in outcomes):
            return None
        if all(outcome["how"] == "held" for outcome in outcomes):
            self._held = crew.plan, int(outcomes[0]["step"])
        spoilt = next((outcome for outcome in outcomes if outcome["how"] in ("corrupt", "diverged")), None)
        return self._distrust.roll_back(crew.plan, spoilt) if spoilt is not None else leaving

    def _sight(self, crew: Crew) -> Sight:
        now = time.monotonic()
        ended = crew.ended()
        still = {} if self._response is None else self._response.still_s(now)  # who records operations is not silent
        silent_s = {r: min(s, still.get(r, s)) for r, s in crew.silent_s(now).items()}
        silent = {r for r in crew.unanswered(now, ASKED_S) if silent_s.get(r, 0.0) > SILENT_S}
        suspects = {crew.plan.seats[r].node for r in silent | {r for r, e in ended.items() if e.how == "died"}} | self._memory.lost
        nodes = self._inventory.glance(worried=bool(suspects))
        dead = {n.name for n in nodes if not n.alive} | self._cluster.unanswering(suspects)
        broken = [e.at for e in ended.values() if e.how == "collective"]
        return Sight(
            now=time.time(),
            ended=ended,
            silent_s=silent_s,
            progress=crew.progress(),
            quiet_s=min([self._journal.quiet_s(crew.began), *still.values()]),  # a step may be long and still go on
            dead_nodes=frozenset(dead),
            draining=self._inventory.leaving(crew, nodes),
            vaults_lost=self._memory.lost,
            leaving=crew.leaving(),
            collective_broken_s=now - min(broken) if broken else 0.0,
        )

    def _limits(self, crew: Crew) -> Limits:
        detect = self._config.detect
        stall = max(detect.hang_timeout_s, detect.hang_steps * self._journal.step_s)
        if not self._journal.stepped(crew.plan.generation):
            stall = detect.first_step_timeout_s
        patient = max(detect.first_step_timeout_s, stall)
        return Limits(max(detect.ping_timeout_s, min(30.0, 4 * crew.slow_answer_s)), stall, patient)

    def _wish_to_leave(self, crew: Crew) -> Trouble | None:
        """A reason of our own to end the generation at a step boundary: asked to stop, or room to grow."""
        if not self._stop.is_set() and self._cluster.driver_is_gone():
            self.stop("the program that started the run has ended")
        if self._stop.is_set():
            return Trouble("preemption", (), (), "asked to stop", self._journal.reached, time.time())
        return self._inventory.growth(crew.plan)

    # trouble

    def _clear(self, crew: Crew, trouble: Trouble) -> None:
        """Everybody out of the old generation, the dead off the books, the incident opened."""
        began = time.monotonic()
        likely = "" if trouble.planned or self._response is None else self._response.likely()
        self._journal.trouble(trouble, crew.plan, likely_cause=likely)
        if self._response is not None:
            self._journal.saw(self._response.reached)
        self._remedy(trouble, crew)
        dead = frozenset(trouble.nodes) if trouble.kind == "node_loss" else frozenset()
        for rank in trouble.ranks:
            if trouble.kind == "hang" and crew.ranks[rank].ended is None:
                crew.kill(rank)
        patience_s = APART_ABORT_S if trouble.ways and not self._journal.stepped(crew.plan.generation) else ABORT_S
        stuck = () if crew.finished else crew.abort(deadline_s=patience_s, dead_nodes=dead)
        for rank, view in enumerate(crew.ranks):
            if (view.ended is not None and view.ended.how == "died") or rank in stuck:
                self._pool.forget(crew.plan.seats[rank].worker)
        self._inventory.bury(dead)
        for node in self._memory.lost:
            self._pool.forget_agent(node)
        self._adopt()
        if trouble.kind == "preemption":
            self._pool.end_workers([crew.plan.seats[rank].worker for rank in trouble.ranks])
        self._journal.cleared(seconds=time.monotonic() - began, stuck=stuck)

    def _remedy(self, trouble: Trouble, crew: Crew) -> None:
        """Carry out what was decided about somebody slow, now that the crew has ended."""
        if trouble.remedy == "reseat":
            for rank in trouble.ranks:
                crew.kill(rank)
                self._pool.forget(crew.plan.seats[rank].worker)
        elif trouble.remedy in ("swap", "shrink"):
            self._inventory.evict(trouble.nodes, trouble.evidence)

    def _count(self, trouble: Trouble) -> Trouble:
        """Count failures of the same step. Raises NoProgress when there are too many.

        Losses of machines, ways and the controller do not count: they end by themselves, and say nothing about the step.
        """
        if trouble.planned or trouble.ways or trouble.kind == "node_loss":
            return trouble
        step = self._journal.stands_at
        self._failures.add(step, trouble.nodes)
        times, node = self._failures.times(step), self._failures.culprit(step)
        if times >= MAX_FAILURES:
            raise NoProgress(f"step {step + 1} failed {times} times in a row; the last time: {trouble}")
        if node is not None and self._dispensable(node):
            self._inventory.evict([node], f"step {step + 1} failed {times} times, on {node} alone")
        return trouble

    def _dispensable(self, node: str) -> bool:
        """Whether what is left without a machine can go on."""
        return self._journal.plan is not None and self._without(node, self._journal.plan).ratio is not None

    def _end(self, status: str, reason: str = "", closing: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write the last word: what the run came to, or what is lost and how to go on."""
        exit_code = {"finished": 0, "unfit": 2, "interrupted": 130, "no_progress": 4}.get(status, 3)
        return self._journal.summary(status, reason=reason, closing=closing or {}, exit_code=exit_code)

    def _put_aside(self, trouble: Trouble) -> None:
        """Trouble that came when no crew was at work: the incident is opened, and the dead go off the books."""
        if self._journal.plan is not None:
            self._journal.trouble(trouble, self._journal.plan)
        if trouble.kind == "node_loss":
            self._inventory.bury(trouble.nodes)


class NoProgress(Refused):
    """The same step failed too often."""
