"""The command line: help, versions, sweeps, and working directories that hold strangers of the same names."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import compose
from launch.main import COMMANDS, commands, main

ROOT = Path(__file__).parents[2]


def holdfast(*words, cwd, module=True, **kwargs):
    """Run the command in a process of its own, as `python -m` does: with the working directory first on the path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if module:
        env["PYTHONPATH"] = str(ROOT)
        program = ["-m", "launch.main"]
    else:  # what the installed console script does
        program = ["-c", f"import sys; sys.path[0] = {str(ROOT)!r}; from launch.main import main; sys.exit(main())"]
    command = [sys.executable, *program, *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, **kwargs)


def test_help_names_every_command_that_exists_and_imports_none(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert (f"\n  {name} " in out) == (name in commands())
    assert {"train", "plan", "report"} <= set(commands())
    program = "import sys; from launch.main import main; main(['--help']); print('torch' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_every_command_has_help_of_its_own(capsys):
    for name in commands():
        assert main([name, "--help"]) == 0
        assert f"holdfast {name}" in capsys.readouterr().out


def test_without_a_command_the_usage_is_shown_and_it_is_an_error(capsys):
    assert main([]) == 2
    assert "usage: holdfast" in capsys.readouterr().out


def test_who_calls_it_as_a_function_keeps_their_own_signal_handler(capsys):
    """It once left its own behind: the rest of a test suite ended at SIGTERM with a KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("holdfast ")


def test_cfg_job_prints_the_config_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "model=tiny", "optim.lr=3e-4", "--cfg", "job"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["model"]["num_layers"] == 4 and values["optim"]["lr"] == 3e-4
    assert "hydra" not in values and list(tmp_path.iterdir()) == []


def test_an_experiment_wins_over_the_defaults_and_an_override_over_the_experiment(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\nseed: 7\noptim: {lr: 0.5, num_steps: 3}\n"
    )
    seen = []

    def task(values):
        seen.append(values)
        return 0

    words = ["--config-dir", str(tmp_path), "experiment=mine", "optim.num_steps=4"]
    assert compose.run_composed("train", words, task) == 0
    assert seen[0]["seed"] == 7 and seen[0]["model"]["dim"] == 64
    assert seen[0]["optim"]["lr"] == 0.5 and seen[0]["optim"]["num_steps"] == 4


@pytest.mark.slow
def test_a_sweep_runs_every_combination_and_gives_the_worst_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def task(values):
        seen.append((values["seed"], values["model"]["dim"]))
        return 3 if values["seed"] == 1 else 0

    assert compose.run_composed("train", ["seed=0,1", "model=tiny,laptop", "--multirun"], task) == 3
    assert seen == [(0, 64), (0, 128), (1, 64), (1, 128)]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_a_sweep_stops_at_the_first_error_and_at_an_interrupt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def refuse(values):
        seen.append(values["seed"])
        raise ValueError("no")

    with pytest.raises(ValueError, match="^no$"):
        compose.run_composed("train", ["seed=0,1,2", "--multirun"], refuse)
    assert seen == [0]
    assert (
        compose.run_composed("train", ["seed=0,1,2", "--multirun"], lambda values: seen.append(values["seed"]) or 130)
        == 130
    )
    assert seen == [0, 0]


def test_compose_gives_plain_values_and_the_working_directory_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = compose.compose(["model=tiny", "layout=auto"])
    assert type(values) is dict and type(values["optim"]["betas"]) is list
    assert values["layout"]["auto"] is True and values["layout"]["schedule"] == "1f1b"
    assert Path.cwd() == tmp_path
    with pytest.raises(ValueError, match="did you mean layout.tp"):
        compose.compose(["layout.tpp=1"])


def hostile(directory):
    """A working directory with packages of our names, all of which end the process if they are imported."""
    trap = "raise SystemExit('a stranger was imported')\n"
    for name in ("configs", "framework", "parallel", "fault_tolerance"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(trap)
    (directory / "configs" / "train.yaml").write_text("stranger: true\n")
    (directory / "launch.py").write_text(trap)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--version"], ["train", "--cfg", "job"], ["train", "layout.tpp=2"]])
def test_a_hostile_working_directory_changes_nothing(words, tmp_path):
    clean = tmp_path / "clean"
    clean.mkdir()
    theirs = tmp_path / "hostile"
    theirs.mkdir()
    here = holdfast(*words, cwd=hostile(theirs), module=False)
    there = holdfast(*words, cwd=clean, module=False)
    assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)
    assert "stranger" not in here.stdout + here.stderr


@pytest.mark.slow
def test_python_m_from_a_directory_with_foreign_configs_uses_ours(tmp_path):
    hostile(tmp_path)
    (tmp_path / "launch.py").unlink()  # `python -m launch.main` would be theirs by right
    done = holdfast("train", "layout.tpp=2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "layout.tpp: no such key; did you mean layout.tp?\n")


def test_a_reader_that_closes_early_is_no_error(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    shell = f"{sys.executable} -m launch.main train --help | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_value_error_that_nobody_meant_for_the_user_keeps_its_traceback(monkeypatch, capsys):
    """A `zip(strict=True)` of ours once failed inside `holdfast plan` and looked like a wrong config."""
    from launch import plan

    monkeypatch.setattr(plan, "main", lambda words: list(zip([1], [], strict=True)))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        main(["plan"])


@pytest.mark.slow
def test_control_c_ends_with_130_and_one_line(tmp_path):
    program = (
        "import sys, time, launch.main as m, launch.plan as p\n"
        "p.main = lambda words: print('up', flush=True) or time.sleep(60)\n"
        "sys.exit(m.main(['plan']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert (child.returncode, stderr) == (130, "interrupted\n")
