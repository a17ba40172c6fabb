"""Host: what an actor is made of, without the actor: an object, called by method name, in a process that keeps a log.

Rule of this file: it knows nothing of Ray, so that what runs in a worker can be run, and tested, in any process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from framework.cluster.checkout import code
from framework.cluster.network import interfaces, socket_environment

TAIL_BYTES = 16_384
BESIDE_NICENESS = 10  # of what is no rank: a rank that is held up holds up all others


class Host:
    """Makes `factory` ("module:name") with `payload` as keyword arguments, and calls its methods."""

    def __init__(
        self,
        factory: str,
        payload: Mapping[str, Any],
        *,
        log: str | None,
        paths: Sequence[str],
        node: str,
        working_dir: str = "",
        address: str = "",
        niceness: int = 0,
    ) -> None:
        """`address` is the node's own; empty where the environment says already which way collectives go. `niceness` as nice(1) has it."""
        if working_dir and Path(working_dir).is_dir():  # Ray would start it in a folder of its own, where no path of the user's leads anywhere
            os.chdir(working_dir)
        if address:
            os.environ.update(socket_environment(address, os.environ, interfaces()))
        if log is not None:
            self.redirect(log)
        stand_back(niceness)
        sys.path += [path for path in paths if path not in sys.path]  # last: a user's file never hides one of ours
        self._node = node
        self._object = load(factory)(**payload)

    def call(self, method: str, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[str, Any]:
        """("value", what it returned) or ("raised", (kind, message, traceback)); raising is not for other processes."""
        try:
            if method.startswith("_"):
                raise AttributeError(f"{method}: only public methods can be called")
            return "value", getattr(self._object, method)(*args, **options)
        except Exception as error:
            return "raised", (type(error).__name__, str(error), traceback.format_exc())

    def identity(self) -> dict[str, Any]:
        """Who this process is and whose code it runs, for the controller to compare."""
        own = asdict(code())
        torch = sys.modules.get("torch")
        return {
            "pid": os.getpid(),
            "node": self._node,
            "code_path": own["path"],
            "version": own["version"],
            "digest": own["digest"],
            "python": platform.python_version(),
            "torch": getattr(torch, "__version__", None),
        }

    def redirect(self, path: str) -> None:
        """From now on what this process prints, native libraries included, is appended to this file."""
        redirect(Path(path))


class _Log(io.FileIO):
    """A log that loses lines where the disk takes none, rather than fail whoever writes them."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def redirect(path: Path) -> None:
    """From now on what this process prints, native libraries included, is appended to this file; where it cannot be opened,
    things stay as they are.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"log: {path}: {error.strerror}", file=sys.stderr, flush=True)
        return
    for name, number in (("stdout", 1), ("stderr", 2)):
        with contextlib.suppress(OSError):
            getattr(sys, name).flush()
        os.dup2(descriptor, number)
        log = io.BufferedWriter(_Log(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(log, encoding="utf-8", errors="backslashreplace", line_buffering=True))
    os.close(descriptor)


def stand_back(niceness: int) -> None:
    """Let processes of less niceness go first on a processor: all threads of this one, which Linux asks for one by one, and its
    session, where Linux weighs sessions first (sched(7), autogroup).
    """
    if not niceness:
        return
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
    if os.getsid(0) == os.getpid():  # else others are in it
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(niceness))


def load(factory: str) -> Any:
    """The object that "module:name" names. Raises ValueError if there is none."""
    module, colon, name = factory.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        if not colon or isinstance(error, AttributeError) or getattr(error, "name", None) == module:
            raise ValueError(f"factory: must be an importable 'module:name', got {factory!r} ({error})") from error
        raise


def tail(path: str, lines: int = 20) -> str:
    """The last lines of a log, or nothing if it is not there."""
    try:
        with Path(path).open("rb") as log:
            log.seek(max(0, Path(path).stat().st_size - TAIL_BYTES))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
