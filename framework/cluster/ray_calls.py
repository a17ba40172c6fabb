"""Calls to actors: an actor with two lanes, the handle to it, a call under way, and why a call failed.

    Remote --call("step", 7, lane="train")--> Call --result()--> value | TimeoutError
                                                                 RemoteError        the method raised
                                                                 WorkerDied         with the exit decoded
                                                                 WorkerUnavailable  Ray does not know yet

Rule of this file: one of the few that Ray enters by; what is called is a plain object (`framework/cluster/host.py`), so none of it leaks
to the other side. A process that dies closes its socket, which is all that Ray sees; on a local cluster the wait status is
read from the zygote's book, elsewhere Ray's guess is passed on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import ray
from ray._private.state import state as ray_state
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from framework.cluster.host import Host
from framework.cluster.machines import CONTROL, Machines
from framework.cluster.nodes import (
    CallError,
    ClusterError,
    Exit,
    RemoteError,
    WorkerDied,
    WorkerUnavailable,
    machine_names,
)

K = TypeVar("K")

LANES = {"train": 1, "ctl": 4}
EXIT_NEWS_S = 0.3  # Ray sees the closed socket before the book has the wait status
NODE_DIED, RAY_KILL = 3, 4  # ActorDiedErrorContext.Reason


class Actor:
    """A `Host` with two lanes."""

    def __init__(self, factory: str, payload: dict[str, Any], options: dict[str, Any]) -> None:
        self._host = Host(factory, payload, **options)

    @ray.method(concurrency_group="train")  # type: ignore[misc]
    def train(self, method: str, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[str, Any]:
        """Call the hosted object, in the one training thread."""
        return self._host.call(method, args, options)

    @ray.method(concurrency_group="ctl")  # type: ignore[misc]
    def ctl(self, method: str, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[str, Any]:
        """Call the hosted object, beside the training thread."""
        return self._host.call(method, args, options)

    @ray.method(concurrency_group="ctl")  # type: ignore[misc]
    def own(self, method: str, args: Sequence[Any]) -> tuple[str, Any]:
        """Call the host itself."""
        return "value", getattr(self._host, method)(*args)


@cache
def actor_class() -> Any:
    """`Actor` as Ray knows it. Made where it is first used, never on import: that draws an id from Ray's generator, and the
    workers that are forked from a process which has drawn one all draw the same ids from then on, on one node at one time.
    """
    return ray.remote(concurrency_groups=LANES, max_task_retries=0)(Actor)


class Remote:
    """Handle of one actor; may be passed to other actors."""

    def __init__(self, handle: ActorHandle, *, name: str, node: str) -> None:
        self.handle, self.name, self.node = handle, name, node
        self.worker_id = name.partition(":")[2]

    def call(self, method: str, *args: Any, lane: str = "ctl", **options: Any) -> Call:
        """Call a method of the hosted object. Returns at once."""
        return Call(self, method, getattr(self.handle, lane).remote(method, args, options))

    def ready(self) -> Call:
        """Its result is the process's identity (`Host.identity`); it comes when the constructor has returned."""
        return Call(self, "identity", self.handle.own.remote("identity", ()))

    def redirect(self, path: str) -> Call:
        """Send what the process prints to this file from now on."""
        return Call(self, "redirect", self.handle.own.remote("redirect", (path,)))

    def kill(self) -> None:
        """End the process for good. Does not wait; a process that is stopped dies when it is continued."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.handle, no_restart=True)

    @property
    def pid(self) -> int | None:
        """Its process on its node, or None before it has started."""
        return self.facts().get("Pid") or None

    def facts(self) -> dict[str, Any]:
        """Ray's record of the actor: State, Address, Pid, DeathCause, ..."""
        return dict(ray_state.actor_table(self.handle._actor_id.hex()))

    def __repr__(self) -> str:
        return f"Remote({self.name} on {self.node})"


class Call:
    """One call that is under way."""

    def __init__(self, remote: Remote, method: str, reference: ray.ObjectRef) -> None:
        self.remote, self.method, self.reference = remote, method, reference

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self.wait(0.0)

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for its end, however it ends. Returns whether it has ended."""
        done, _ = ray.wait([self.reference], timeout=timeout_s)
        return bool(done)

    def result(self, timeout_s: float | None = None) -> Any:
        """What the method returned.

        Raises TimeoutError, WorkerDied, WorkerUnavailable, or RemoteError with what the method raised.
        """
        try:
            how, value = ray.get(self.reference, timeout=timeout_s)
        except GetTimeoutError:
            raise TimeoutError(f"{self.remote.name}.{self.method}: must answer within {timeout_s} s, it did not") from None
        except RayError as error:
            raise _decoded(self.remote, error) from error
        if how == "raised":
            kind, message, text = value
            raise RemoteError(actor=self.remote.name, node=self.remote.node, kind=kind, message=message, traceback=text)
        return value


def wait_any(calls: Sequence[Call], timeout_s: float | None) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Wait until one has ended. Returns all that have ended by then, and those still under way."""
    return _waited(calls, 1, timeout_s)


def wait_all(calls: Sequence[Call], timeout_s: float | None) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Wait until all have ended, or the time is over."""
    return _waited(calls, len(calls), timeout_s)


def answers(calls: Mapping[K, Call], within_s: float) -> dict[K, Any]:
    """What those say that answer in time. Who does not, or raises, is left out."""
    wait_all(list(calls.values()), within_s)
    found = {}
    for key, call in calls.items():
        with contextlib.suppress(CallError, TimeoutError):
            found[key] = call.result(0)
    return found


def _waited(calls: Sequence[Call], num: int, timeout_s: float | None) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    if not calls:
        return (), ()
    references = list({call.reference: None for call in calls})
    if timeout_s != 0:
        ray.wait(references, num_returns=min(num, len(references)), timeout=timeout_s)
    ended = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
    done = tuple(call for call in calls if call.reference in ended)
    return done, tuple(call for call in calls if call.reference not in ended)


def _decoded(remote: Remote, error: RayError) -> CallError:
    """Which of our errors one of Ray's is."""
    who: Any = {"actor": remote.name, "node": remote.node}
    if isinstance(error, ActorUnavailableError):
        if _node_is_down(remote.node):
            return WorkerDied(**who, exit=Exit.NODE, cause=f"node {remote.node} died")
        return WorkerUnavailable(**who, cause=first_line(str(error)))
    if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
        return RemoteError(**who, kind=type(error.cause).__name__, message=str(error.cause), traceback=str(error))
    if isinstance(error, OutOfMemoryError):
        return WorkerDied(**who, exit=Exit.OOM, cause="Ray ended it because the node is short of memory")
    return WorkerDied(**who, **_death(remote, error))


def _death(remote: Remote, error: RayError) -> dict[str, Any]:
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return {"exit": Exit.INIT, "cause": f"its constructor failed: {_last_line(str(error))}"}
    facts = {}
    with contextlib.suppress(Exception):  # the inventory may be out of reach too; the error itself still tells
        facts = remote.facts()
    cause = facts.get("DeathCause")
    context = cause.actor_died_error_context if cause is not None else None
    reason = context.reason if context is not None else 0
    status = _exit_status(int(facts.get("Pid") or (context.pid if context is not None else 0)))
    text = f"{error} {context.error_message if context is not None else ''}"
    if reason == NODE_DIED or _node_is_down(remote.node) or "node died" in text.lower():
        return {"exit": Exit.NODE, "cause": f"node {remote.node} died"}
    if reason == RAY_KILL:
        return {"exit": Exit.KILLED, "cause": "it was ended by ray.kill"}
    if status is not None:
        return _told_apart(*status)
    if cause is not None and cause.HasField("oom_context"):
        return {"exit": Exit.OOM, "cause": "Ray ended it because the node is short of memory"}
    return {"exit": Exit.UNKNOWN, "cause": _detail(text)}


def _told_apart(exit_code: int, out_of_memory: bool) -> dict[str, Any]:
    if exit_code >= 0:
        return {"exit": Exit.EXITED, "cause": f"exited with code {exit_code}"}
    name = signal.Signals(-exit_code).name
    if out_of_memory and -exit_code == signal.SIGKILL:
        return {"exit": Exit.OOM, "signal": 9, "cause": "killed by signal 9 (SIGKILL) as the kernel ran out of memory"}
    return {"exit": Exit.SIGNAL, "signal": -exit_code, "cause": f"killed by signal {-exit_code} ({name})"}


def _exit_status(pid: int) -> tuple[int, bool] | None:
    control = os.environ.get(CONTROL)
    return Machines(control).exit_status(pid, wait_s=EXIT_NEWS_S) if control and pid else None


def _node_is_down(name: str) -> bool:
    control = os.environ.get(CONTROL)
    if control:
        with contextlib.suppress(ClusterError):
            return Machines(control).names().get(name) == "dead"
    rows = [row for row in ray.nodes() if row["Alive"]]
    return bool(name) and name not in machine_names(rows)


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no reason given"


def _detail(text: str) -> str:
    found = re.search(r"exit detail: (.+?)(\. |$)", text, re.DOTALL)
    return first_line(found.group(1) if found else text)
