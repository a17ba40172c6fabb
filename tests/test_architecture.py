"""The floors and the doors: who may import whom, and through which files outside libraries come in.

parallel < fault_tolerance < framework < launch          nothing imports upward, and no imports go round in a circle
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("parallel", "fault_tolerance", "framework", "launch")
DOORS = {  # library: the files that may import it, as patterns of their path
    "ray": r"framework/(cluster|local_cluster|warden|ray_\w+)\.py",
    "wandb": r"framework/telemetry_wandb\.py",
    "hydra": r"launch/compose\.py",
    "omegaconf": r"launch/compose\.py",
    "deepspeed": r"(parallel|framework)/deepspeed\w*\.py",
    "rich": r"framework/progress\.py|launch/\w+\.py",
    "yaml": r"framework/(run_dir|report|interop_\w+)\.py|launch/\w+\.py",
}
PURE = (  # files that think, and therefore must be testable without torch
    "parallel/boxes.py",
    "parallel/layout.py",
    "parallel/stages.py",
    "parallel/atlas.py",
    "parallel/checks.py",
    "fault_tolerance/placement.py",
    "fault_tolerance/interval.py",
    "fault_tolerance/budget.py",
    "framework/plan.py",
    "framework/watch.py",
    "framework/seating.py",
    "framework/incident.py",
    "framework/config.py",
    "framework/config_rules.py",
)
FILES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


@functools.cache
def imports(file: Path, *, at_top: bool = False) -> tuple[str, ...]:
    """The modules that a file imports; `at_top`: only those that importing the file itself imports."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return tuple(walk(ast.parse((ROOT / file).read_text())))


def module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_imports_upward(file):
    floor = FLOORS.index(file.parts[0])
    above = {name for name in imports(file) if name.split(".")[0] in FLOORS[floor + 1 :]}
    assert not above, f"{file} is on floor {FLOORS[floor]}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_outside_libraries_come_in_through_their_doors(file):
    for library in {name.split(".")[0] for name in imports(file)} & DOORS.keys():
        assert re.fullmatch(DOORS[library], file.as_posix()), f"{library} may be imported by {DOORS[library]} only"


HEAVY = ("torch", "ray", "deepspeed", "wandb")


def heavy_of(name: str) -> dict[str, str]:
    """The large libraries that come in with a module, and the module that imports each."""
    known = {module(file): file for file in FILES}
    heavy: dict[str, str] = {}
    seen, queue = {name}, [name]
    while queue:
        here = queue.pop()
        for found in imports(known[here], at_top=True):
            if found.split(".")[0] in HEAVY:
                heavy.setdefault(found.split(".")[0], here)
            if found in known and found not in seen:
                seen.add(found)
                queue.append(found)
    return heavy


def test_what_thinks_is_reached_without_torch():
    for file in PURE:
        if (ROOT / file).exists():
            assert not heavy_of(module(Path(file))), f"{file} imports {heavy_of(module(Path(file)))}"


def test_the_process_that_was_typed_never_loads_torch():
    """Through one check of another engine's version it had: two seconds of processor time more, before every first step."""
    assert "torch" not in heavy_of("framework.driver") and "torch" not in heavy_of("launch.train")


def test_no_imports_go_round_in_a_circle():
    known = {module(file) for file in FILES}
    edges = {module(file): {name for name in imports(file, at_top=True) if name in known} for file in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for following in sorted(edges[name]):
                visit(following, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse((ROOT / file).read_text())), f"{file} has no header"
