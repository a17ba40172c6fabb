"""Native: a library that each machine compiles for itself, once, from a source beside the code.

    ~/.cache/holdfast/<name>-<key>/<file>      the next start loads it in milliseconds

One process compiles under a file lock while the others wait for it; the result appears by one rename, so that a
compilation that was killed leaves nothing that could be loaded. A run does not wait: it has the build started beside it
(`python -m <module>`, at a low priority) and takes the result up when it is there.

Rule of this file: where a build is and who makes it. How it is compiled, and what it is, its own file says.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]


class BuildError(RuntimeError):
    """A library could not be compiled or loaded on this machine."""


@dataclass(frozen=True, slots=True)
class Native:
    """One library. `depends` is all that its bytes depend on, `compile` writes `file` into an empty folder.

    `module` is the module whose `main` makes it.
    """

    name: str
    file: str
    module: str
    depends: Callable[[], str]
    compile: Callable[[Path], None]

    def path(self) -> Path:
        """Where the build is, or will be."""
        return cache_dir() / f"{self.name}-{_key(self.depends)}" / self.file

    def build(self, *, wait: bool = True) -> bool:
        """Compile what is not there yet. Without `wait`, not if another process is at it; returns whether it is there.

        Raises what `compile` raises, and OSError if the cache cannot be written to.
        """
        path = self.path()
        if path.exists():
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    self.compile(Path(folder))
                    made = Path(folder, self.file)
                    with made.open("rb") as written:
                        os.fsync(written.fileno())  # half a library would not fail to load: it would end the process
                    made.replace(path)
        return True

    def build_beside(self) -> None:
        """Have a process of its own compile what is not there yet; returns at once. What goes wrong is in `build.log`."""
        path = self.path()
        if path.exists():
            return
        with contextlib.suppress(OSError):  # a cache that cannot be written to: who loads says why
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path.parent / "build.log").open("ab") as log:
                subprocess.Popen(
                    [sys.executable, "-m", self.module],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def main(self, *, without: str) -> int:
        """The process of `build_beside`. Returns an exit code; if nothing is built, says what there will be `without` it."""
        os.nice(10)
        try:
            self.build(wait=False)
        except Exception as error:
            print(f"{without}: {reason(error)}", file=sys.stderr)
            return 1
        return 0


class TakenUp(Generic[T]):
    """What is made of a build, from when it is there on; None before, and if `load` does not believe it.

    Whether it is there is looked up once a second at most: it is asked for in the middle of work on many small things.
    """

    def __init__(self, native: Native, load: Callable[[Path], T | None], *, every_s: float = 1.0) -> None:
        self._native, self._load, self._every_s = native, load, every_s
        self._found: T | None = None
        self._next: float | None = 0.0

    def __call__(self) -> T | None:
        """It, if it is there."""
        if self._next is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every_s
            if self._native.path().exists():
                self._found, self._next = self._load(self._native.path()), None
        return self._found


C_FLAGS = ("-O3", "-shared", "-fPIC")


def c_library(source: Path, module: str) -> Native:
    """One C file as a library, named as the file is. It may be shared by machines with the same kind of processor and C library."""
    name = source.stem

    def depends() -> str:
        return " ".join((source.read_text(), platform.machine(), *platform.libc_ver(), *C_FLAGS))

    def compile(folder: Path) -> None:
        compiler = os.environ.get("CC", "cc")
        try:
            command = [compiler, *C_FLAGS, str(source), "-o", str(folder / f"{name}.so")]
            subprocess.run(command, capture_output=True, text=True, check=True)
        except OSError as error:
            raise BuildError(f"{name}: needs a C compiler, got {error}; install gcc or set CC") from error
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{name}: {compiler} must compile {source.name}, got an error: {error.stderr}") from error

    return Native(name, f"{name}.so", module, depends, compile)


@functools.cache
def _key(depends: Callable[[], str]) -> str:
    return hashlib.sha256(depends().encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """Where builds are kept: `$HOLDFAST_CACHE`, else `$XDG_CACHE_HOME/holdfast`, else `~/.cache/holdfast`."""
    if own := os.environ.get("HOLDFAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"


def reason(error: Exception) -> str:
    """Why a build failed, in one line, out of what may be pages of a compiler's words."""
    lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
