"""Worker: one rank's process, which outlives the plans it takes part in.

    run (lane "train")   connect -> build -> restore -> train -> how it ended        blocks for a generation
    poll, abort, request_stop, leave (lane "ctl")                                    answered meanwhile

Between generations it keeps its process, imports and data. Whatever goes wrong inside a generation comes back as a
value that says `how`: the controller decides, a worker never does. Only when the controller has been silent for too
long does a worker act alone: it leaves its crew, so that a half of a split cluster cannot train on unnoticed.

Rule of this file: one process. It has never heard of Ray, and of other ranks it knows the mesh.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._C._distributed_c10d import Store, TCPStore

from fault_tolerance.detection.stacks import arm
from fault_tolerance.snapshots.catalogue import Snapshot
from fault_tolerance.snapshots.interval import at_most, fixed, young
from fault_tolerance.snapshots.snapshot_plan import SnapshotPlan
from framework.build import make_engine, make_feed, make_mfu, make_schedule, model_builder, open_data
from framework.cluster.host import redirect
from framework.cluster.notice import Notice
from framework.config import Config, decode
from framework.control.incident import Recovery
from framework.drills.fault_acts import corrupt_block
from framework.drills.faults import FaultInjector
from framework.plan import Plan
from framework.planning.devices import check_here, decide, device_of
from framework.trainer import Outcome, Trainer, TrainSettings
from framework.training.finish import sample_text, state_digest
from framework.training.heap import keep_freed_memory
from framework.training.holding import Held, hold, take_up
from framework.training.initial import InitialWeights
from framework.training.integrity import Integrity, flip_bit
from framework.training.pair_test import pair_test
from framework.training.recording import Recording
from framework.training.restoring import RestoreFailed, restore, tensor_reader
from framework.training.staging import Staging
from framework.training.streams import seed_streams
from framework.trouble.log_watch import log_name
from parallel.assemble import meta
from parallel.engine import Engine
from parallel.mesh import Mesh

LEASE_S = 45.0  # longer than a controller takes to be started again
LEASE_LOOK_S = 5.0
MAX_SAID = 10_000
MAX_ROWS = 4_000  # rows that every rank keeps of its generation: whoever lives can tell what the crew had done, of a minute without Ray too
COLLECTIVE_WORDS = (
    "gloo", "NCCL", "Socket", "ProcessGroup", "Connection closed", "Connection reset", "Connection refused", "Broken pipe",
    "Timed out", "timed out", "DistBackendError", "DistNetworkError", "DistStoreError",
)  # fmt: skip


class Worker:
    """Hosted in an actor; its methods are called by name."""

    def __init__(self, *, config: dict[str, Any], run_id: str, secret: str, node: str, name: str) -> None:
        keep_freed_memory()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._config: Config = decode(config)
        self._run_id, self._secret, self._node, self._name = run_id, bytes.fromhex(secret), node, name
        self._device = decide(self._config).kind
        check_here(self._device)
        self._data = open_data(self._config)
        self._stores: dict[tuple[str, int], Store] = {}
        self._said: deque[tuple[int, dict[str, Any]]] = deque(maxlen=MAX_SAID)
        self._number = 0
        self._rows: deque[dict[str, Any]] = deque(maxlen=MAX_ROWS)
        self._num_rows, self._told = 0, (0, 0)  # of this generation: all, and those when last but once and last asked
        self._generation = 0
        self._over = 0  # this generation and all before it have been ended from outside
        self._stop_asked = self._hold_asked = 0
        self._held: tuple[Plan, Held] | None = None
        self._mesh: Mesh | None = None
        self._recording: Recording | None = None
        self._standing = ""
        self._trainer: Trainer | None = None
        self._phase = "idle"
        self._done = threading.Event()
        self._done.set()
        self._heard = time.monotonic()
        logs = Path(self._config.run_dir) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._notice = Notice()
        self._stacks = arm(logs / f"stacks_{name}.txt")
        threading.Thread(target=self._watch_lease, daemon=True, name="lease").start()

    # lane "ctl"

    def poll(self, acked: int) -> dict[str, Any]:
        """What this rank is doing, and what it has said since number `acked`."""
        self._heard = time.monotonic()
        self._told = (self._told[1], self._num_rows)
        while self._said and self._said[0][0] <= acked:
            self._said.popleft()
        trainer = self._trainer
        progress = trainer.progress if trainer is not None else (0, self._phase)
        return {"generation": self._generation, "progress": progress, "said": list(self._said), "leaving": self._notice.came}

    def rows(self) -> list[dict[str, Any]]:
        """The steps of the present generation, or the last one, as this rank knows them: all ranks know the same."""
        return list(self._rows)

    def request_stop(self, generation: int) -> None:
        """End at the next step boundary, with all ranks; the first one, if the generation does not step yet."""
        self._stop_asked = max(self._stop_asked, generation)
        trainer = self._trainer
        if generation == self._generation and trainer is not None:
            trainer.request_stop()

    def request_hold(self, generation: int) -> None:
        """End at the next step boundary, with all ranks, and hold the state: a vault is lost, and all ranks live."""
        self._hold_asked = max(self._hold_asked, generation)
        if generation == self._generation and self._trainer is not None:
            self._trainer.request_hold()

    def request_snapshot(self, generation: int) -> None:
        """Take a snapshot at the next step boundary, with all ranks."""
        if generation == self._generation and self._trainer is not None:
            self._trainer.request_snapshot()

    def request_test(self, generation: int) -> None:
        """Have all ranks measure each other at the next step boundary."""
        if generation == self._generation and self._trainer is not None:
            self._trainer.request_test()

    def request_shares(self, generation: int, shares: list[int]) -> None:
        """Have replica i take `shares[i]` samples of a global batch from the next step on, all ranks alike; empty: equally many."""
        if generation == self._generation and self._trainer is not None:
            self._trainer.request_shares(shares)

    def abort(self, generation: int) -> None:
        """Throw this rank out of whatever it waits in; a generation that has not begun here is not begun any more."""
        self._over = max(self._over, generation)
        mesh, recording = self._mesh, self._recording
        if generation >= self._generation:
            if mesh is not None:
                mesh.sever()
            if recording is not None:
                recording.abort()

    def vitals(self) -> dict[str, float]:
        """The memory of this process, in bytes."""
        found = {"rss_bytes": float(psutil.Process().memory_info().rss)}
        if self._device == "cuda":
            mesh = self._mesh
            found["device_peak_bytes"] = 0.0 if mesh is None else float(torch.cuda.max_memory_allocated(mesh.device))
        return found

    def leave(self) -> tuple[Plan, int] | None:
        """End whatever generation runs: at a step boundary, with the state held here, if the crew still steps; by force if not.

        Blocks. Returns the plan and the step of what is held.
        """
        self.request_hold(self._generation)
        if not self._done.wait(30.0):
            self.abort(self._generation)
        over = self._done.wait(15.0)
        held = self._held if over else None
        return None if held is None else (held[0], held[1].step)

    def close_out(self, snapshot: dict[str, Any], finished: bool) -> dict[str, Any]:
        """What is said of the final state: its digest and, of a finished run, text that the model writes."""
        found = Snapshot.from_json(snapshot)
        with tensor_reader(found, node=self._node, secret=self._secret) as read:
            said: dict[str, Any] = {"state_sha256": state_digest(found.plan.atlas.specs, read, step=found.step)}
            writes = self._config.data.kind != "synthetic"  # its tokens are numbers, and no text
            if finished and writes and self._config.monitor.sample_bytes:
                said["sample"] = sample_text(self._config, self._data, read)
        return said

    def close(self) -> None:
        """The process is about to end."""
        self.abort(self._generation)

    # lane "train"

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """One generation. Returns how it ended: `finished`, `stopped`, `held`, `diverged`, `corrupt`, `collective`, `aborted`, `error`
        or `restore_failed`, with evidence.
        """
        plan: Plan = order["plan"]
        self._generation, self._phase = plan.generation, "connect"
        self._said.clear()
        self._number = 0
        self._rows.clear()
        self._num_rows, self._told = 0, (0, 0)
        self._done.clear()
        self._heard = time.monotonic()
        redirect(Path(self._config.run_dir) / "logs" / log_name(plan.generation, order["rank"], self._name))
        try:
            outcome = self._generation_of(plan, order)
            return {
                "how": outcome.kind,
                "step": outcome.step,
                "val_loss": outcome.val_loss,
                "clean": outcome.clean,
                "ranks": outcome.ranks,
                "evidence": outcome.reason,
            }
        except RestoreFailed as error:
            return {"how": "restore_failed", "evidence": str(error)}
        except Exception as error:  # the one place where any failure of a generation becomes a value
            traceback.print_exc()
            return {"how": self._how(error), "evidence": _last_line(error)}
        finally:
            gc.collect()  # what an error's frames held on to: of a group that lives on, gloo's thread may wake for ever
            self._phase, self._trainer = "idle", None
            self._done.set()

    @property
    def _ended(self) -> bool:
        return self._over >= self._generation

    @property
    def _holding(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.holding

    def _how(self, error: Exception) -> str:
        if self._ended:
            return "aborted"
        return "collective" if _is_collective(error) else "error"

    def _generation_of(self, plan: Plan, order: dict[str, Any]) -> Outcome:
        began = time.monotonic()
        self._recording = recording = self._record(plan, order)
        self._mesh = mesh = Mesh.connect(
            self._store(order["store"]),
            rank=order["rank"],
            layout=plan.layout,
            generation=plan.generation,
            device=device_of(self._device, rank=order["rank"], emulated=self._config.cluster.address == "local"),
            timeout_s=self._config.detect.first_step_timeout_s,
            given_up=lambda: self._ended,
        )
        if self._ended:
            mesh.sever()  # it was asked for while there was nothing to sever
        engine: Engine | None = None
        staging: Staging | None = None
        try:
            connected = time.monotonic()
            self._phase = "build"
            engine = make_engine(self._config, mesh, schedule=plan.schedule, num_microbatches=plan.num_microbatches)
            built = time.monotonic()
            faults = self._faults(plan, order, mesh, engine)
            self._phase = "restore"
            faults.recovering(order["reached"])
            recovery = self._restore(engine, mesh, plan, order)
            self._say({
                "event": "restored",
                "rank": order["rank"],
                "recovery": Recovery(
                    **recovery,
                    connect_s=connected - began,
                    build_s=built - connected,
                    restore_s=time.monotonic() - built,
                ),
            })
            keeping = SnapshotPlan.from_json(order["snapshots"])
            staging = Staging(
                keeping,
                rank=order["rank"],
                secret=self._secret,
                given_up=lambda: self._ended or self._holding,
                patient=self._config.fault_tolerance.max_steps_lost is not None,
            )
            return self._train(engine, mesh, plan, faults, staging, recording, start=recovery["step"], reporter=order["rank"] == 0)
        except BaseException:
            mesh.sever()  # who waits for this rank is freed, and what it has under way ends: closing alone cuts no operation short
            recording.abort()
            raise
        finally:
            self._phase = "close"
            recording.over()
            if staging is not None:
                staging.close()
            if engine is not None:
                engine.close()
            self._mesh = self._recording = None
            recording.close()
            mesh.close()

    def _restore(self, engine: Engine, mesh: Mesh, plan: Plan, order: dict[str, Any]) -> dict[str, Any]:
        held, self._held = self._held, None  # what is not taken up now is old
        if plan.source.tier == "ranks":
            return take_up(None if held is None else held[1], engine, mesh, plan.source.step)
        if plan.source.tier == "fresh":
            engine.initialise(InitialWeights(meta(model_builder(self._config)), seed=self._config.seed))
            return {"tier": "fresh", "step": 0}
        return restore(
            engine, mesh, plan.source, snapshot=order["restore"], node=self._node, secret=self._secret
        )

    def _train(
        self,
        engine: Engine,
        mesh: Mesh,
        plan: Plan,
        faults: FaultInjector,
        staging: Staging,
        recording: Recording,
        *,
        start: int,
        reporter: bool,
    ) -> Outcome:
        config, layout = self._config, plan.layout
        feed = make_feed(
            config, self._data, dp=layout.dp, dp_index=mesh.seat[1], num_microbatches=plan.num_microbatches
        )
        self._trainer = trainer = Trainer(
            engine=engine,
            feed=feed,
            learning_rate=make_schedule(config).lr,
            snapshots=staging,
            faults=faults,
            sum_over_ranks=mesh.sum,
            num_ranks=layout.world,
            settings=self._settings(feed.held_out_tokens, dp=layout.dp, mfu=self._mfu(plan) if reporter else None),
            emit=lambda item: self._emit(item | {"generation": plan.generation, "layout": str(layout)}, reporter=reporter),
            record=recording,
            reseed=lambda step: seed_streams(config.seed, step, mesh.seat[:2]),
            pair_test=lambda: pair_test(mesh.device),
            integrity=self._integrity(engine, mesh, start),
            untold=self._untold,
            rank=mesh.rank,
        )
        if self._stop_asked >= plan.generation:
            trainer.request_stop()  # asked while this rank was still restoring
        if self._hold_asked >= plan.generation:
            trainer.request_hold()
        try:
            outcome = trainer.run(start)
            if outcome.kind in ("finished", "stopped"):
                staging.finish(outcome.step)
            if outcome.kind == "held":
                self._held = plan, hold(engine, mesh, outcome.step)
            return outcome
        finally:
            feed.close()

    def _settings(self, held_out_tokens: int, *, dp: int, mfu: Callable[[float], float] | None) -> TrainSettings:
        config = self._config
        every, mtbf_s = config.fault_tolerance.every_steps, config.fault_tolerance.mtbf_hours * 3600
        most = config.fault_tolerance.max_steps_lost
        return TrainSettings(
            num_steps=config.optim.num_steps,
            global_batch=config.optim.global_batch,
            tokens_per_step=config.optim.global_batch * config.data.seq_len,
            grad_clip=config.optim.grad_clip,
            eval_every=config.monitor.eval_every,
            held_out_tokens=held_out_tokens,
            interval=lambda cost_s, step_s: fixed(every) if isinstance(every, int) else at_most(most, young(cost_s, step_s, mtbf_s)),
            max_steps_lost=most,
            max_skips=config.detect.max_skips,
            durable_every=config.fault_tolerance.durable.every_steps,
            dp=dp,
            mfu=mfu,
            spike_sigma=config.detect.spike_sigma,
        )

    def _mfu(self, plan: Plan) -> Callable[[float], float]:
        local = self._config.cluster.address == "local"  # emulated nodes are one machine
        here = plan.layout.world if local else len(plan.ranks_on(self._node))
        return make_mfu(self._config, plan.layout, workers_here=here)

    def _faults(self, plan: Plan, order: dict[str, Any], mesh: Mesh, engine: Engine) -> FaultInjector:
        rank = order["rank"]
        return FaultInjector(
            self._config.drill.faults,
            directory=Path(self._config.run_dir) / "drill",
            rank=rank,
            node=self._node,
            leads_node=plan.ranks_on(self._node)[0] == rank,
            seated=plan.nodes,
            on_call=self._config.drill.on_call,
            acts={
                "flip_bit": lambda fault: print("flip_bit:", flip_bit(engine.state()), flush=True),
                "slow_link": lambda fault: print("slow_link:", mesh.pace(int(fault.severity * 1e6)), "connections", flush=True),
                "corrupt_block": lambda fault: corrupt_block(
                    self._node, num_blocks=int(fault.severity), run=self._run_id, secret=self._secret
                ),
            },
        )

    def _integrity(self, engine: Engine, mesh: Mesh, start: int) -> Integrity | None:
        every = self._config.detect.digest_every
        if not every:
            return None
        return Integrity(engine.state, engine.atlas, rank=mesh.rank, every=every, share=mesh.share, start=start)

    def _record(self, plan: Plan, order: dict[str, Any]) -> Recording:
        def tell(line: str) -> None:
            if order["rank"] == 0 and line != self._standing:
                self._standing = line
                self._say({"event": "record", "step": plan.source.step, "reason": line})

        return Recording(
            order["rings"].get(order["rank"]), rank=order["rank"], generation=plan.generation, at_once=order["record_at_once"], tell=tell
        )

    def _store(self, address: tuple[str, int]) -> Store:
        """One client per controller for the life of the process: a new one per generation sometimes stalls for 5 s."""
        if address not in self._stores:
            self._stores[address] = TCPStore(*address, None, False, timeout=timedelta(seconds=60))
        return self._stores[address]

    def _emit(self, item: dict[str, Any], *, reporter: bool) -> None:
        """Every rank keeps the rows, one tells them: if it is lost before it has, another can."""
        if "event" not in item:
            self._rows.append(item)
            self._num_rows += 1
        if reporter:
            self._say(item)

    def _untold(self) -> list[dict[str, Any]]:
        """The newest rows, which the controller may not have: an answer has come when the next question does. They go into snapshots,
        so that whoever goes on from one can tell them, should all ranks be lost.
        """
        few = self._num_rows - self._told[0]
        return list(self._rows)[-few:] if few else []

    def _say(self, item: dict[str, Any]) -> None:
        self._number += 1
        self._said.append((self._number, item))

    def _watch_lease(self) -> None:
        while True:
            time.sleep(LEASE_LOOK_S)
            if not self._done.is_set() and time.monotonic() - self._heard > LEASE_S:
                print(f"lease: no word from the controller for {LEASE_S:.0f} s; leaving the crew", flush=True)
                self.abort(self._generation)


def _is_collective(error: Exception) -> bool:
    """Whether an error came out of communication, so that its cause is likely somewhere else."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in COLLECTIVE_WORDS)


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
