"""Recorder build: `recorder.cpp` as a loadable extension, compiled once per machine.

    ~/.cache/holdfast/recorder-<source, torch, python>/holdfast_recorder.so      next start: loaded in milliseconds

One process compiles (about 35 s) under a file lock while the others wait for it; the result appears by one rename, so
that a compilation that was killed leaves nothing that could be loaded. A run does not wait: it has the build started
beside it (`python -m parallel.recorder_build`, at a low priority) and takes the result up when it is there.

Rule of this file: it either returns the extension or raises BuildError with the reason in one line.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

NAME = "holdfast_recorder"
SOURCE = Path(__file__).with_name("recorder.cpp")


class BuildError(RuntimeError):
    """The extension could not be compiled or loaded on this machine."""


def cache_dir() -> Path:
    """Where compiled extensions are kept: `$HOLDFAST_CACHE`, else `$XDG_CACHE_HOME/holdfast`, else `~/.cache/holdfast`."""
    if own := os.environ.get("HOLDFAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"


def library() -> Path:
    """Where the build for this source, torch and Python is, or will be. Does not import torch."""
    return cache_dir() / f"recorder-{_key()}" / f"{NAME}.so"


def build_beside() -> None:
    """Have a process of its own compile what is not there yet; returns at once. What goes wrong is in `build.log`."""
    path = library()
    if path.exists():
        return
    with contextlib.suppress(OSError):  # a cache that cannot be written to: no record, and `load` says why
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / "build.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "parallel.recorder_build"],
                cwd=SOURCE.parents[1],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def load(*, compile: bool = True) -> ModuleType:
    """The extension, compiled first if it is not cached; without `compile`, that is refused too. Raises BuildError."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    try:
        path = library()
        if not path.exists():
            if not compile:
                raise BuildError("recorder: the extension is not built yet")
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent / "lock"):
                if not path.exists():
                    _compile(path)
        return _import(path)
    except BuildError:
        raise
    except Exception as error:  # a missing compiler, a full disk, an unloadable library: training goes on without
        raise BuildError(f"recorder: the extension must compile and load, got {_line(error)}") from error


@functools.cache
def _key() -> str:
    text = SOURCE.read_text() + importlib.metadata.version("torch") + sys.version
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def why_not() -> str | None:
    """Why this machine will never have a build, or None if it has one or can make it."""
    compiler = os.environ.get("CXX", "g++")
    if library().exists() or shutil.which(compiler) is not None:
        return None
    return f"recorder: needs a C++ compiler, {compiler!r} is not on the path; install g++ or set CXX"


def _compile(library: Path) -> None:
    if reason := why_not():
        raise BuildError(reason)
    from torch.utils import cpp_extension  # imports setuptools: only where something is compiled

    with tempfile.TemporaryDirectory(dir=library.parent) as build:
        if shutil.which("ninja") is None:  # it may live in an environment that is not activated
            os.environ["PATH"] += f":{Path(sys.executable).parent}"
        cpp_extension.load(NAME, [str(SOURCE)], build_directory=build, extra_cflags=["-O2"], is_python_module=False)
        Path(build, f"{NAME}.so").replace(library)


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    import torch  # noqa: F401 the extension is linked against its libraries

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def main() -> int:
    """Compile, unless another process is at it. Returns an exit code."""
    os.nice(10)
    path = library()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        try:
            if not path.exists():
                _compile(path)
        except Exception as error:
            print(f"the record of collectives will be off: {_line(error)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
