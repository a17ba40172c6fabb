"""Recorder build: `recorder.cpp` as a loadable extension, compiled once per machine (about 35 s).

Rule of this file: it either returns the extension or raises BuildError with the reason in one line.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from parallel.native import BuildError, Native, reason

NAME = "holdfast_recorder"
SOURCE = Path(__file__).with_name("recorder.cpp")


def _depends() -> str:
    return SOURCE.read_text() + importlib.metadata.version("torch") + sys.version


def _compile(folder: Path) -> None:
    if refusal := why_not():
        raise BuildError(refusal)
    from torch.utils import cpp_extension  # imports setuptools: only where something is compiled

    if shutil.which("ninja") is None:  # it may live in an environment that is not activated
        os.environ["PATH"] += f":{Path(sys.executable).parent}"
    cpp_extension.load(NAME, [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O2"], is_python_module=False)


RECORDER = Native("recorder", f"{NAME}.so", "parallel.recorder_build", _depends, _compile)


def library() -> Path:
    """Where the build for this source, torch and Python is, or will be. Does not import torch."""
    return RECORDER.path()


def load(*, compile: bool = True) -> ModuleType:
    """The extension, compiled first if it is not cached; without `compile`, that is refused too. Raises BuildError."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    try:
        if not compile and not library().exists():
            raise BuildError("recorder: the extension is not built yet")
        RECORDER.build()
        return _import(library())
    except BuildError:
        raise
    except Exception as error:  # a missing compiler, a full disk, an unloadable library: training goes on without
        raise BuildError(f"recorder: the extension must compile and load, got {reason(error)}") from error


def why_not() -> str | None:
    """Why this machine will never have a build, or None if it has one or can make it."""
    compiler = os.environ.get("CXX", "g++")
    if library().exists() or shutil.which(compiler) is not None:
        return None
    return f"recorder: needs a C++ compiler, {compiler!r} is not on the path; install g++ or set CXX"


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    import torch  # noqa: F401 the extension is linked against its libraries

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


if __name__ == "__main__":
    sys.exit(RECORDER.main(without="the record of collectives will be off"))
