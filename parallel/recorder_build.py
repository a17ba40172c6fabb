"""Recorder build: `recorder.cpp` as a loadable extension, compiled once per machine.

    ~/.cache/holdfast/recorder-<source, torch, python>/holdfast_recorder.so      next start: loaded in milliseconds

One process compiles (about 35 s) under a file lock while the others wait for it; the result appears by one rename, so
that a compilation that was killed leaves nothing that could be loaded.

Rule of this file: it either returns the extension or raises BuildError with the reason in one line.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

NAME = "holdfast_recorder"
SOURCE = Path(__file__).with_name("recorder.cpp")


class BuildError(RuntimeError):
    """The extension could not be compiled or loaded on this machine."""


def cache_dir() -> Path:
    """Where compiled extensions are kept: `$HOLDFAST_CACHE`, else `$XDG_CACHE_HOME/holdfast`, else `~/.cache/holdfast`."""
    if own := os.environ.get("HOLDFAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"


def load() -> ModuleType:
    """The extension, compiled first if no build for this source, torch and Python is cached. Raises BuildError."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    try:
        home = cache_dir() / f"recorder-{_key()}"
        home.mkdir(parents=True, exist_ok=True)
        library = home / f"{NAME}.so"
        with _locked(home / "lock"):
            if not library.exists():
                _compile(library)
        return _import(library)
    except BuildError:
        raise
    except Exception as error:  # a missing compiler, a full disk, an unloadable library: training goes on without
        raise BuildError(f"recorder: the extension must compile and load, got {_line(error)}") from error


def _key() -> str:
    text = SOURCE.read_text() + torch.__version__ + sys.version + str(torch._C._GLIBCXX_USE_CXX11_ABI)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compile(library: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"recorder: needs a C++ compiler, {compiler!r} is not on the path; install g++ or set CXX")
    from torch.utils import cpp_extension  # imports setuptools: only where something is compiled

    with tempfile.TemporaryDirectory(dir=library.parent) as build:
        if shutil.which("ninja") is None:  # it may live in an environment that is not activated
            os.environ["PATH"] += f":{Path(sys.executable).parent}"
        cpp_extension.load(NAME, [str(SOURCE)], build_directory=build, extra_cflags=["-O2"], is_python_module=False)
        Path(build, f"{NAME}.so").replace(library)


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
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
