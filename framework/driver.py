"""Driver: what runs in the user's terminal: open the cluster, start the controller, show what happens, give the exit code.

The controller is an actor of its own and does all the work; if it is lost, Ray starts it again and the driver calls it
once more. The first SIGINT or SIGTERM asks the run to end at a step boundary with its state kept; a second one ends it
at once.

Rule of this file: no decision about the run is taken here.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from framework import run_dir
from framework.cluster.cluster import Call, CallError, Cluster, ClusterError, Remote, RemoteError, WorkerDied
from framework.cluster.head_watch import PATIENCE_S, HeadWatch
from framework.cluster.local_cluster import LocalCluster
from framework.cluster.nodes import DOMAIN_LABEL, Exit, complaint
from framework.cluster.reach import Reach, reachable
from framework.config import Config, plain
from framework.control.durable import check_same, newest_of, resolve, tracking_of
from framework.data.readable import read_from
from framework.monitor.progress import make_progress
from framework.monitor.startup import Startup
from framework.monitor.telemetry import Telemetry
from framework.run_dir import RunDir
from parallel.recorder_build import RECORDER

EXIT_CODES = {"finished": 0, "failed": 3, "no_progress": 4, "interrupted": 130}
FOLLOW_S = 1.0
LOCAL_HEAD_S = 10.0  # a head that is stopped, or waits for a processor, answers within that
LAST_SAVE_S = 8.0  # after 45 s without a head, of the 60 s that Ray leaves
FIND_AGAIN_S = 120.0  # Ray looks for dead nodes for some 15 s before it starts anew what ran there


def run(config: Config, *, startup: Startup, early: LocalCluster | None = None) -> int:
    """Train. Returns the exit code: 0 finished, 3 unrecoverable, 4 no progress, 130 interrupted.

    `early` is a local cluster that was begun before this module, and with it Ray, was imported; it is ended here.
    Raises ValueError for what the user can mend.
    """
    if config.layout.engine == "deepspeed":
        from parallel.deepspeed_library import check_installed  # brings PyTorch: seconds for every other run

        check_installed()
    if config.cluster.address == "local":  # elsewhere the files may lie on the nodes alone, and who opens them first will tell
        read_from(config.data)
    asked, resumed = config.resume, resolve(config.resume, own=config.run_dir)
    config = replace(config, resume=resumed)  # found once, by who was asked: to another process, `auto` may mean this very run
    changed = check_same(config, resumed) if resumed is not None else ()
    directory = RunDir.create(config.run_dir, plain(config))
    run_id = directory.run_id
    if resumed is not None and (tracked := tracking_of(resumed)) is not None:
        directory.track_as(tracked)
    directory.close()
    progress = make_progress(config.monitor.progress, num_steps=config.optim.num_steps)
    shown = Telemetry({} if progress is None else {"progress": progress})
    RECORDER.build_beside()  # by the process that was typed: what the run's processes start ends with the run
    try:
        with (
            _Interrupts() as interrupts,
            _opened(config, run_id, startup, early) as cluster,
            reachable(config.run_dir, Reach(cluster.address, cluster.control)),
        ):
            shown.event(_notice(f"cluster up after {startup.total_s:.1f} s; run directory {config.run_dir}"))
            if asked == "auto":
                shown.event(_notice(f"resume=auto: {resumed or 'no run beside this one has a checkpoint, so it begins'}"))
            for change in changed:
                shown.event(_notice(f"resumed with another {change}"))
            if interrupts.count:
                summary = {"status": "interrupted", "reason": "by a signal, before anything was trained"}
            else:
                payload = {
                    "config": plain(config),
                    "run_id": run_id,
                    "secret": secrets.token_hex(16),
                    "startup": startup.plain(),
                }
                log = str(Path(config.run_dir).resolve() / "logs" / "controller.log")
                controller = cluster.start_controller("framework.controller:Controller", payload, log=log)
                with _head_watched(cluster, controller, config, shown):
                    _await_constructor(controller, interrupts)
                    summary = _follow(cluster, controller, shown, interrupts)
    except ClusterError as error:
        raise ValueError(str(error)) from error
    finally:
        shown.close()
    if summary["status"] == "unfit":
        raise ValueError(summary["reason"])
    _last_word(config, summary)
    return EXIT_CODES[summary["status"]]


def plan(config: Config) -> str:
    """Everything that would be decided, as text. Starts nothing; the nodes of a cluster that is running are asked what they
    have free. Raises ValueError as `run` would.
    """
    from framework.cluster.ray_rooms import ask
    from framework.planning.outlook import outlook  # it brings PyTorch, which this process needs for nothing else

    sys.path += [path for path in import_paths() if path not in sys.path]
    rooms = None if config.cluster.address == "local" else ask(config)
    return outlook(replace(config, resume=resolve(config.resume, own=config.run_dir)), rooms)


def doctor(config: Config) -> tuple[bool, str]:
    """Examine the nodes of a cluster. Returns whether a run may start, and the report. Raises ValueError as `run` would."""
    from framework.trouble.doctor import examine, words

    run_id = secrets.token_hex(4)
    try:
        with _opened(config, run_id, Startup(time.time()), None) as cluster:
            nodes = cluster.require(num_nodes=config.cluster.num_nodes, timeout_s=config.cluster.start_timeout_s)
            payload = {"run_id": run_id, "secret": secrets.token_hex(16)}
            agents = {
                n.name: cluster.start_vault(n.name, "framework.agent:Agent", {**payload, "node": n.name, "host": n.ip})
                for n in nodes
            }
            checkup = examine(agents, {n.name: n.ip for n in nodes}, one_machine=cluster.control is not None)
    except ClusterError as error:
        raise ValueError(str(error)) from error
    return not any(finding.must for finding in checkup.findings), words(checkup)


def import_paths() -> list[str]:
    """Where a user's own modules lie: the working directory, and what PYTHONPATH names. They come last on every path."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return list(dict.fromkeys(str(Path(path).resolve()) for path in (".", *filter(None, named))))


@contextmanager
def _opened(config: Config, run_id: str, startup: Startup, early: LocalCluster | None) -> Iterator[Cluster]:
    wish = config.cluster
    named = wish.domains if isinstance(wish.domains, tuple) else ()
    domains = {f"n{i}": domain for i, domain in enumerate(named)}
    cluster = Cluster.open(
        run_id=run_id,
        address=wish.address,
        num_nodes=wish.num_nodes,
        workers_per_node=wish.workers_per_node,
        spare_nodes=wish.spare_nodes,
        gpus_per_worker=0 if wish.address == "local" else {"auto": None, "cpu": 0, "cuda": 1}[wish.device],
        domains=domains,
        domain_label=wish.domains if isinstance(wish.domains, str) else DOMAIN_LABEL,
        start_timeout_s=wish.start_timeout_s,
        import_paths=import_paths(),
        working_dir=str(Path.cwd()),
        early=early,
    )
    startup.mark("cluster")
    startup.divide("cluster", {name.removesuffix("_s").replace("_", " "): s for name, s in cluster.timings.items()})
    try:
        yield cluster
    finally:
        cluster.close()


@contextmanager
def _head_watched(cluster: Cluster, controller: Remote, config: Config, shown: Telemetry) -> Iterator[None]:
    """A run is saved, and ends with a last word, when Ray's head is lost. Nobody starts that of a local cluster again, so nobody waits
    for it.
    """
    patience_s = PATIENCE_S if cluster.control is None else LOCAL_HEAD_S

    def gone(reason: str) -> None:
        with suppress(Exception):  # whatever Ray has to say by now, there must be a last word
            controller.call("salvage", True).wait(LAST_SAVE_S)
        saved = newest_of(config) or config.resume  # its own, or that which it began from
        way = f"a checkpoint exists: go on with resume={saved}" if saved else "no checkpoint exists: start again, with fault_tolerance.durable.every_steps set"
        summary = {"status": "failed", "reason": f"{reason}; Ray ends, and the run with it; {way}"}
        run_dir.give_up(config.run_dir, summary)
        _last_word(config, summary)
        os._exit(EXIT_CODES["failed"])  # whatever would be asked of Ray now would wait for its head

    with HeadWatch(cluster.head(), tell=lambda text: shown.event(_notice(text)), away=lambda: _salvage(controller), gone=gone, patience_s=patience_s):
        yield


def _salvage(controller: Remote) -> None:
    """Have the newest state saved; whoever asks does not wait."""
    controller.call("salvage", False)


def _await_constructor(controller: Remote, interrupts: _Interrupts) -> None:
    """Wait until the controller has read its config.

    Raises ValueError with what it says against it, if it does, and KeyboardInterrupt at a second signal.
    """
    ready = controller.ready()
    while not ready.wait(FOLLOW_S):
        if interrupts.count > 1:
            raise KeyboardInterrupt
    try:
        ready.result(0)
    except WorkerDied as error:
        if text := complaint(error):
            raise ValueError(text) from error
        if error.exit is Exit.INIT:
            raise
        # else a machine's fault: whoever follows the run calls for another one
    except (CallError, TimeoutError):
        return


def _follow(cluster: Cluster, controller: Remote, shown: Telemetry, interrupts: _Interrupts) -> dict[str, Any]:
    """Show what the controller tells until its run ends; call it again if it was lost meanwhile."""
    since, asked = 0, False
    call = controller.call("run", lane="train")
    while True:
        try:
            if call.wait(FOLLOW_S):
                _show(controller.call("progress", since).result(10.0), shown)
                return dict(call.result(0))
            since = _show(controller.call("progress", since).result(10.0), shown)
            if interrupts.count and not asked:
                asked = True
                controller.call("stop", "interrupted by a signal")
            if interrupts.count > 1:
                return {"status": "interrupted", "reason": "ended at once by a second signal"}
        except RemoteError:
            raise  # a fault of the program, not of a machine: starting again would only repeat it
        except TimeoutError:
            continue  # busy, not lost: a lost one says so by an error
        except CallError as error:
            shown.event(_notice(f"controller lost: {error}"))
            controller, call = _again(cluster, error)
            since, asked = 0, False


def _again(cluster: Cluster, error: Exception) -> tuple[Remote, Call]:
    deadline = time.monotonic() + FIND_AGAIN_S
    while time.monotonic() < deadline:
        controller = cluster.find_controller(timeout_s=5.0)
        if controller is not None:
            try:
                controller.ready().result(FIND_AGAIN_S)
                return controller, controller.call("run", lane="train")
            except (CallError, TimeoutError):
                pass  # it may still be on its way up; the deadline bounds the tries
        time.sleep(0.2)
    raise ClusterError(f"the controller must come back within {FIND_AGAIN_S:.0f} s, it did not: {error}") from error


def _show(news: dict[str, Any], shown: Telemetry) -> int:
    for item in news["said"]:
        if "row" in item:
            shown.step(item["row"])
        elif "event" in item:
            shown.event(item["event"])
    return int(news["last"])


def _notice(text: str) -> dict[str, Any]:
    return {"kind": "info", "reason": text, "step": 0}


def _last_word(config: Config, summary: dict[str, Any]) -> None:
    """What a person wants to know at the end."""
    lines = [": ".join(filter(None, (summary["status"], summary["reason"])))] if summary["status"] not in ("finished", "unfit") else []
    if summary.get("sample"):
        lines += ["", "what the model writes:", *(f"  | {line}" for line in str(summary["sample"]).rstrip().splitlines()), ""]
    for key, form in (("final_loss", ".4f"), ("val_loss", ".4f"), ("state_sha256", "")):
        if summary.get(key) is not None:
            lines.append(f"{key:<13}{summary[key]:{form}}")
    lines.append(f"{'run':<13}{config.run_dir}   (holdfast report {config.run_dir})")
    print("\n".join(lines), file=sys.stderr, flush=True)


class _Interrupts:
    """Counts SIGINT and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.count += 1
