"""Checkout: which copy of this program is running, so that all processes of a run can be told to be the same.

The five packages have plain names, and a folder `launch/` or a file `configs.py` in somebody's working directory would
win if it came first on the path. So every process can say where its code comes from, and a stranger is an error.

Rule of this file: standard library only, so that it can be asked before anything heavy is imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("parallel", "fault_tolerance", "framework", "launch", "configs")


@dataclass(frozen=True, slots=True)
class Code:
    """A process's copy of the program: where it lies, its version, and a digest of its sources."""

    path: str
    version: str
    digest: str


@functools.cache
def code() -> Code:
    """The copy that this process runs. Costs a few milliseconds once."""
    return Code(str(ROOT), version(), _digest())


def same_code(mine: Code, theirs: Code, where: str) -> None:
    """Raises ValueError if a process runs other sources; they may lie elsewhere. `where` names that process."""
    if mine.digest != theirs.digest:
        raise ValueError(
            f"{where}: must run the same code as the controller, got {theirs.version} ({theirs.digest}) at {theirs.path} "
            f"against {mine.version} ({mine.digest}) at {mine.path}; install the same version on every node"
        )


def version() -> str:
    """The installed version of the distribution."""
    try:
        return metadata.version("holdfast")
    except metadata.PackageNotFoundError:
        return "0+uninstalled"


def strangers() -> dict[str, str]:
    """The packages of ours that would be imported from another place than this checkout, with that place."""
    found = {name: _origin(name) for name in PACKAGES}
    return {name: place for name, place in found.items() if Path(place) != ROOT / name}


def _origin(name: str) -> str:
    module = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if module is None else module.__spec__
    if spec is None:
        return "nowhere"
    places = list(spec.submodule_search_locations or ())
    return str(Path(places[0] if places else spec.origin or "nowhere").resolve())


def _digest() -> str:
    whole = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*")):
            if file.suffix in (".py", ".c", ".cpp", ".yaml"):
                whole.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
                whole.update(file.read_bytes())
    return whole.hexdigest()[:16]
