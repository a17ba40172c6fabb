"""Durable: when checkpoints are written to storage, by whom, and which of them a run starts from.

    snapshot protected at step s, and s is due     ->  every agent holds it, and writes its node's share out of the vault
    all shares are there                           ->  one commit makes the checkpoint visible; old ones go

Training does not wait for any of it: the bytes are those of a snapshot. A save that fails is tried again at once a few
times, then with the next snapshot, and never stops the run. Whoever waits for one does so while its storage takes bytes, and
not much longer.

Rule of this file: occasions and agreement. The format is `fault_tolerance/checkpoints/checkpoint.py`'s.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fault_tolerance.checkpoints import shelf
from fault_tolerance.checkpoints.checkpoint import INDEX, Checkpoint, commit
from fault_tolerance.checkpoints.index import entry_from_plain
from fault_tolerance.checkpoints.retention import retain
from fault_tolerance.checkpoints.storage import StorageError, open_storage
from framework import run_dir
from framework.cluster.cluster import Call, CallError, Remote
from framework.config import Config, plain
from framework.config_identity import changes
from framework.control.headway import Headway
from framework.plan import Plan, Source
from parallel.atlas import TensorSpec

HOLD_S = 10.0
STALLED_S = 300.0  # without a byte taken, and a save has failed
ENDING_S = 30.0  # the same for a run that has come to its end: it may have been told to leave the machine
LOOK_S = 0.5
AT_ONCE_S = 30.0  # a save that has failed after more is not tried again at once: it would be long until somebody hears of it


def resolve(resume: str | None, *, own: str) -> str | None:
    """The checkpoint that `resume` means: a run directory's newest, a checkpoint, or `auto`: that of the newest run beside
    the run `own` that has one, and None, for a new run, if none has. The same command can so be typed again and again.

    Raises ValueError if there is none where one was named. A path is absolute, as every process of the run must find it.
    """
    if resume is None:
        return None
    if resume == "auto":
        return next((found for place in run_dir.run_dirs(Path(own).parent) if (found := _newest(str(place)))), None)
    found = resume if INDEX in open_storage(resume).sizes() else _newest(resume)
    if found is None:
        raise ValueError(f"resume: must be a run or checkpoint directory with a complete checkpoint, got {resume}; see holdfast checkpoint ls")
    return found if "://" in found else str(Path(found).absolute())


def newest_of(config: Config) -> str | None:
    """The newest checkpoint that a run has saved itself, wherever it keeps them."""
    return shelf.newest(config.fault_tolerance.durable.dir or f"{config.run_dir}/checkpoints")


def _newest(place: str) -> str | None:
    return next((found for root in _roots(place) if (found := shelf.newest(root, ours=False)) is not None), None)


def tracking_of(path: str) -> str | None:
    """The identity in W&B of the run that saved a checkpoint; None if it was none of ours."""
    checkpoint = Checkpoint.open(path)
    found = checkpoint.extra.get("tracking_id", checkpoint.extra.get("run_id"))
    checkpoint.close()
    return None if found is None else str(found)


def check_same(config: Config, path: str) -> tuple[str, ...]:
    """Whether a config may continue a checkpoint. Returns the changes to be written down; raises ValueError if not."""
    checkpoint = Checkpoint.open(path)
    try:
        before = checkpoint.extra.get("config")
    finally:
        checkpoint.close()
    if before is None:
        return ()
    found = changes(before, plain(config))
    found.require()
    return tuple(map(str, found.recorded))


class Durable:
    """The checkpoints of one run. One save at a time."""

    def __init__(self, config: Config, *, run_id: str, losses: Mapping[int, float] | None = None) -> None:
        """`losses`: the held-out losses known so far, by step, as they come in."""
        self._config, self._run_id = config, run_id
        self._losses: Mapping[int, float] = {} if losses is None else losses
        self._wish = config.fault_tolerance.durable
        self.root = self._wish.dir or f"{config.run_dir}/checkpoints"
        self._first = config.resume
        self._thread: threading.Thread | None = None
        self._news: list[dict[str, Any]] = []
        self._rejected: set[str] = set()
        told = [e for e in run_dir.events(config.run_dir) if e["kind"] == "checkpoint" and e["saved"]]
        self.reached = max((int(e["step"]) for e in told), default=-1)  # the newest step ever saved, by this life of the controller or another
        self._saved = -1
        self._saved_at = time.time()
        self._asked = False
        self._headway = Headway(time.monotonic())
        self._visible = False
        self.failure = ""  # why the last save failed; empty if it did not, or has not yet

    @property
    def age_s(self) -> float | None:
        """Seconds since the newest checkpoint, or since the start; None where none is asked for while the run goes on."""
        return time.time() - self._saved_at if self._wish.every_steps > 0 else None

    def newest(self, *, than: int | None = None) -> Source | None:
        """The newest checkpoint this run can start from: its own, else the one it resumes. A storage that cannot be looked into has
        none of its own, which `poll` then tells.

        `than`: what is not newer than this step is of no use. Storage is not asked then where nothing newer was ever saved: one
        that does not answer would hold up who has a snapshot in memory.
        """
        if than is not None and self.reached <= than:
            return None
        try:
            own = list(shelf.checkpoints(self.root).values())
        except StorageError as error:
            own, reason = [], f"checkpoints could not be looked for: {error}"
            self._news.append({"step": than or 0, "reason": reason, "age_s": time.time() - self._saved_at, "saved": False})
        for path in [path for path in (*reversed(own), self._first) if path is not None and path not in self._rejected]:
            try:
                checkpoint = Checkpoint.open(path)
            except (ValueError, StorageError):
                continue  # damaged after its commit: an older one is better than none
            checkpoint.close()
            return Source("durable", checkpoint.step, path)
        return None

    def reject(self, path: str) -> None:
        """A checkpoint failed its proof: it is never tried again."""
        self._rejected.add(path)

    def due(self, step: int) -> bool:
        """Whether the snapshot of a step is to be saved, by the interval or on demand."""
        every = self._wish.every_steps
        return self._requested() or (every > 0 and step // every > max(self._saved, 0) // every)

    def newly_requested(self) -> bool:
        """Whether a checkpoint was asked for since the last time; its snapshot is not to wait for the interval."""
        before, self._asked = self._asked, self._requested()
        return self._asked and not before

    def begin(self, plan: Plan, step: int, agents: Mapping[str, Remote], specs: tuple[TensorSpec, ...]) -> bool:
        """Save the protected snapshot of a step in the background. False if a save is under way."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self._saved, self._headway, self.failure = step, Headway(time.monotonic()), ""
        self._visible = False
        self._clear_request()
        self._thread = threading.Thread(target=self._save, args=(plan, step, dict(agents), specs), daemon=True, name="save")
        self._thread.start()
        return True

    def finish(self, patience_s: float = ENDING_S) -> str:
        """Wait for the save that is under way, as long as its storage takes something. Returns why it is not over; empty if it is."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(LOOK_S)
            if self._thread.is_alive() and self._headway.is_stalled(time.monotonic(), patience_s):
                stuck = f"a save to {self.root} was not waited for, of which nothing was taken for {patience_s:.0f} s"
                return "" if self._visible else stuck  # else it is older ones that cannot be removed
        return ""

    def poll(self) -> Iterator[dict[str, Any]]:
        """What has come of saves since the last time, as events."""
        while self._news:
            yield self._news.pop(0)

    def _save(self, plan: Plan, step: int, agents: dict[str, Remote], specs: tuple[TensorSpec, ...]) -> None:
        began, reason, attempts, path = time.monotonic(), "", 0, self._path(step)
        for attempt in range(self._wish.retries + 1):
            try:
                step = self._hold(plan, step, agents)
                path = self._path(step)
                num_bytes = self._write(plan, step, path, agents, specs)
                self._visible = True
            except Exception as error:  # whatever it is: a save that fails never stops training
                reason, attempts = f"{type(error).__name__}: {error}", attempt + 1
                if attempt == self._wish.retries or time.monotonic() - began > AT_ONCE_S:
                    break
                self._discard(path)
                time.sleep(min(10.0, 0.5 * 2**attempt))
                continue
            finally:
                for agent in agents.values():
                    agent.call("let_go")
            took, self._saved, self._saved_at = time.monotonic() - began, step, time.time()
            self.reached = max(self.reached, step)
            self._news.append(
                {"step": step, "reason": f"saved to {path}", "path": path, "bytes": num_bytes, "save_s": took, "saved": True}
            )
            self._prune()
            return
        self._saved, self.failure = -1, reason  # the next snapshot tries again
        age, times = time.time() - self._saved_at, "once" if attempts == 1 else f"{attempts} times"
        self._news.append({
            "step": step,
            "reason": f"save failed {times}, training goes on, the newest checkpoint is {age:.0f} s old: {reason}",
            "path": path,
            "attempts": attempts,
            "age_s": age,
            "saved": False,
        })
        self._discard(path)

    def _path(self, step: int) -> str:
        return f"{self.root.rstrip('/')}/{shelf.step_name(step)}"

    def _hold(self, plan: Plan, step: int, agents: Mapping[str, Remote]) -> int:
        """Have every node hold a snapshot until it is written. Returns its step: the one asked for, or, where steps are
        so fast that it has gone meanwhile, a newer one.
        """
        calls = {node: agents[node].call("hold", plan.generation) for node in plan.nodes}
        held = {node: set(call.result(HOLD_S)) for node, call in calls.items()}
        everywhere = {s for s in set.intersection(*held.values()) if s >= step}
        if not everywhere:
            have = ", ".join(f"{node} has {sorted(steps)}" for node, steps in held.items())
            raise ValueError(f"save: a snapshot of step {step} or later must be on every node, got: {have}")
        return step if step in everywhere else max(everywhere)

    def _discard(self, path: str) -> None:
        """Take away what a failed attempt has written, so that a full disk is not made fuller; not a checkpoint."""
        with contextlib.suppress(StorageError, OSError):
            storage = open_storage(path, attempts=1)
            if INDEX not in storage.sizes():
                storage.remove_all()

    def _write(
        self, plan: Plan, step: int, path: str, agents: dict[str, Remote], specs: tuple[TensorSpec, ...]
    ) -> int:
        calls = [agents[node].call("save", path, plan.generation, step) for node in plan.nodes]
        entries = [entry_from_plain(self._awaited(call, [agents[node] for node in plan.nodes])) for call in calls]
        commit(path, entries, specs=specs, extra=self._extra(plan, step)).close()
        return sum(entry.num_bytes for entry in entries)

    def _awaited(self, call: Call, agents: Sequence[Remote]) -> Any:
        """The result of a call; meanwhile it is looked how far the agents have come. Raises TimeoutError when they are stuck."""
        while not call.wait(LOOK_S):
            taken = 0
            for asked in [agent.call("taken") for agent in agents]:
                with contextlib.suppress(CallError, TimeoutError):  # its own call will say so
                    taken += asked.result(LOOK_S)
            self._headway = self._headway.look(time.monotonic(), taken)
            if self._headway.is_stalled(time.monotonic(), STALLED_S):
                raise TimeoutError(f"save: {self.root} must take the state, it has taken nothing for {STALLED_S:.0f} s")
        return call.result(0)

    def _extra(self, plan: Plan, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "samples": step * self._config.optim.global_batch,
            "run_id": self._run_id,
            "tracking_id": run_dir.RunDir(self._config.run_dir).tracking_id,
            "generation": plan.generation,
            "val_loss": self._loss_of(step),
            "layout": str(plan.layout),
            "schedule": plan.schedule,
            "config": run_dir.clean(plain(self._config)),
        }

    def _prune(self) -> None:
        try:
            steps = list(shelf.checkpoints(self.root))
            verdicts = retain(
                steps,
                keep_last=self._wish.keep_last,
                keep_every=self._wish.keep_every,
                keep_best=self._wish.keep_best,
                losses={step: loss for step in steps if (loss := self._loss_of(step)) is not None},
            )
            shelf.remove(self.root, [verdict.step for verdict in verdicts if not verdict.keep])
        except (StorageError, OSError) as error:
            self._news.append({"step": self._saved, "reason": f"old checkpoints could not be removed: {error}", "saved": True})

    def _loss_of(self, step: int) -> float | None:
        """The newest held-out loss up to a step."""
        known = [evaluated for evaluated in list(self._losses) if evaluated <= step]
        return self._losses[max(known)] if known else None

    def _requested(self) -> bool:
        return (Path(self._config.run_dir) / "control" / "checkpoint").exists()

    def _clear_request(self) -> None:
        (Path(self._config.run_dir) / "control" / "checkpoint").unlink(missing_ok=True)


def _roots(resume: str) -> list[str]:
    """Where checkpoints of what `resume` names may lie: where that run was told to put them, below it, or in it."""
    roots = [f"{resume}/checkpoints", resume]
    if (Path(resume) / "config.yaml").is_file():
        told = run_dir.config(resume)["fault_tolerance"]["durable"]["dir"]
        roots = [told, *roots] if told else roots
    return roots
