"""What an actor prints goes to its log, and costs it nothing where the disk takes none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PRINTS = """
import os, resource, sys
from pathlib import Path
from framework.cluster.host import redirect
first, second = map(Path, sys.argv[1:])
redirect(first)
print("before")
os.system("echo of a child")
resource.setrlimit(resource.RLIMIT_FSIZE, (first.stat().st_size, resource.RLIM_INFINITY))
print("while it is full", flush=True)
print("an error", file=sys.stderr)
redirect(Path("/dev/null/log"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("after")
redirect(second)
print("elsewhere")
"""


def test_a_log_that_cannot_be_written_loses_lines_and_stops_nobody(tmp_path: Path) -> None:
    """A worker's print raised where the disk of its log was full, in the middle of a step."""
    first, second = tmp_path / "a" / "first.log", tmp_path / "second.log"
    subprocess.run([sys.executable, "-c", PRINTS, str(first), str(second)], check=True, cwd=Path(__file__).parents[3], timeout=100)
    assert first.read_text() == "before\nof a child\nafter\n"
    assert second.read_text() == "elsewhere\n"
