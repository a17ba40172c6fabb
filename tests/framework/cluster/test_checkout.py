"""A process knows which copy of the program it runs."""

import subprocess
import sys

import pytest

from framework.cluster.checkout import PACKAGES, ROOT, Code, code, same_code, strangers


def test_every_package_comes_from_this_checkout():
    assert strangers() == {}
    assert all((ROOT / name / "__init__.py").exists() for name in PACKAGES)


def test_a_stranger_on_the_path_is_named(tmp_path):
    (tmp_path / "launch.py").write_text("")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    program = (
        "import framework.cluster.checkout as c, sys; sys.path.insert(0, sys.argv[1]); print(sorted(c.strangers().items()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "configs") in out and str(tmp_path / "launch.py") in out


def test_other_sources_are_refused_and_another_place_is_not():
    mine = code()
    assert mine == code() and len(mine.digest) == 16
    same_code(mine, Code("/elsewhere", mine.version, mine.digest), "rank 3")
    with pytest.raises(
        ValueError, match=r"rank 3 on node1: must run the same code as the controller, got .* at /elsewhere"
    ):
        same_code(mine, Code("/elsewhere", "9", "0" * 16), "rank 3 on node1")
