"""docs/errors.md is true: every command of its table says what the table says, in one line, with exit code 2."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest

import launch.train
from launch.main import main

TABLE = Path(__file__).parents[2] / "docs" / "errors.md"
ROWS = re.findall(r"^\| `holdfast (.*?)` \| `(.*?)` \|$", TABLE.read_text(), flags=re.MULTILINE)


def test_the_table_is_read_whole():
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines) > 40


def accept(values, early):
    """In the place of a training run, which a row that is not refused any more would start."""
    launch.train.config_of(values)
    pytest.fail("the config was accepted")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "says"), ROWS, ids=[command for command, _ in ROWS])
def test_a_bad_input_is_refused_in_one_line(command, says, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.train, "_job", accept)
    monkeypatch.setattr(launch.train, "_begun", lambda words: contextlib.nullcontext())  # it starts processes
    assert main(shlex.split(command)) == 2
    assert capfd.readouterr().err == says + "\n"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
