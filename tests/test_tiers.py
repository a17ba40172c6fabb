"""The quick tests start no cluster: whoever does is marked, and by that comes into the lane of the clusters.

A test starts one if it, or anything of its file that it names, says so: a helper, a fixture, a program handed to another process.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
STARTS = re.compile(r"""LocalCluster\.(start|begin)\(|\bCluster\.open\(|\bray\.init\(|(HOLDFAST|launch\.main"), "train\"""")
HELPERS = ("tests.launch.runs", "tests.framework.attached")  # what comes from there runs `holdfast train`, or waits for it
READS = {"rows", "NOTHING", "HOLDFAST", "COMMON", "ROOT"}  # and what does not

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def unmarked(source: str) -> list[str]:
    """The tests of a file that start a cluster and do not say so."""
    if not STARTS.search(source) and not any(helper in source for helper in HELPERS):
        return []
    tree, lines = ast.parse(source), source.splitlines()
    if any(re.match(r"pytestmark = .*mark\.cluster\b", ast.unparse(node)) for node in tree.body):
        return []
    named = {node.name: node for node in tree.body if isinstance(node, Function)}
    starting = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module in HELPERS
        for alias in node.names
        if alias.name not in READS
    }
    starting |= {name for name, node in named.items() if STARTS.search("\n".join(lines[node.lineno - 1 : node.end_lineno]))}
    while more := {name for name, node in named.items() if name not in starting and starting & names(node)}:
        starting |= more
    tests = [node for name, node in named.items() if name.startswith("test_") and name in starting]
    return [node.name for node in tests if not any("mark.cluster" in ast.unparse(mark) for mark in node.decorator_list)]


def names(node: Function) -> set[str]:
    """What a function or class names, by a word of its code or by a parameter, as fixtures are."""
    found = (n.id if isinstance(n, ast.Name) else n.arg for n in ast.walk(node) if isinstance(n, ast.Name | ast.arg))
    return set(found)


def test_whoever_starts_a_cluster_is_marked() -> None:
    files = sorted(TESTS.rglob("test_*.py"))
    assert len(files) > 100
    assert {str(file.relative_to(TESTS)): found for file in files if file != Path(__file__) and (found := unmarked(file.read_text()))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def test_a():\n    Cluster.open(run_id='r')\n", ["test_a"]),
        ("@MARK.cluster\ndef test_a():\n    Cluster.open(run_id='r')\n", []),
        ("pytestmark = MARK.cluster\ndef test_a():\n    ray.init()\n", []),
        ("@pytest.fixture\ndef c():\n    yield LocalCluster.start()\n\ndef test_a(c): ...\ndef test_b(): ...\n", ["test_a"]),
        ("from tests.launch.runs import Run, rows\ndef go():\n    return Run()\ndef test_a():\n    go()\ndef test_b():\n    rows(1)\n", ["test_a"]),
        ('P = ""\n@pytest.mark.slow\ndef test_a():\n    run([sys.executable, "-m", "launch.main", "train"])\n', ["test_a"]),
    ],
)
def test_it_is_found_through_helpers_fixtures_and_programs(source: str, found: list[str]) -> None:
    assert unmarked(source.replace("MARK", "pytest.mark")) == found
