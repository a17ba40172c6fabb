"""The floors and the doors: who may import whom, and through which files outside libraries come in.

parallel < fault_tolerance < framework < launch          nothing imports upward, and no imports go round in a circle
"""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("parallel", "fault_tolerance", "framework", "launch")
DOORS = {  # library: the files that may import it, as patterns of their path
    "ray": r"framework/cluster/\w+\.py",
    "wandb": r"framework/monitor/wandb_sink\.py",
    "hydra": r"launch/compose\.py",
    "omegaconf": r"launch/compose\.py",
    "deepspeed": r"parallel/deepspeed\w*\.py",
    "rich": r"framework/monitor/progress\.py|launch/\w+\.py",
    "yaml": r"framework/(run_dir|monitor/report|interop/\w+)\.py|launch/\w+\.py",
}
PURE = (  # files that think, and therefore must be testable without torch
    "parallel/boxes.py",
    "parallel/layout.py",
    "parallel/stages.py",
    "parallel/atlas.py",
    "parallel/checks.py",
    "fault_tolerance/coding/placement.py",
    "fault_tolerance/snapshots/interval.py",
    "fault_tolerance/snapshots/budget.py",
    "framework/plan.py",
    "framework/control/watch.py",
    "framework/planning/seating.py",
    "framework/control/incident.py",
    "framework/config.py",
    "framework/config_rules.py",
)
FILES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


@dataclass(frozen=True, slots=True)
class Read:
    """What the rules ask of a file; its syntax tree is not kept."""

    header: str | None
    imports: tuple[str, ...]
    at_top: tuple[str, ...]  # only what importing the file itself imports


@functools.cache
def read(file: Path) -> Read:
    tree = ast.parse((ROOT / file).read_text())
    return Read(ast.get_docstring(tree), tuple(imports(tree)), tuple(imports(tree, at_top=True)))


def imports(node: ast.AST, *, at_top: bool = False) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # no expression imports anything
            yield from imports(child, at_top=at_top)


def module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def test_nothing_imports_upward():
    for file in FILES:
        floor = FLOORS.index(file.parts[0])
        above = {name for name in read(file).imports if name.split(".")[0] in FLOORS[floor + 1 :]}
        assert not above, f"{file} is on floor {FLOORS[floor]}"


def test_outside_libraries_come_in_through_their_doors():
    for file in FILES:
        for library in {name.split(".")[0] for name in read(file).imports} & DOORS.keys():
            assert re.fullmatch(DOORS[library], file.as_posix()), f"{file}: {library} may be imported by {DOORS[library]} only"


HEAVY = ("torch", "ray", "deepspeed", "wandb")


def heavy_of(name: str) -> dict[str, str]:
    """The large libraries that come in with a module, and the module that imports each."""
    known = {module(file): file for file in FILES}
    heavy: dict[str, str] = {}
    seen, queue = {name}, [name]
    while queue:
        here = queue.pop()
        for found in read(known[here]).at_top:
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
    edges = {module(file): {name for name in read(file).at_top if name in known} for file in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for following in sorted(edges[name]):
                visit(following, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_every_file_says_what_it_is():
    assert [str(file) for file in FILES if not read(file).header] == [], "files without a header"
