"""holdfast train as a person types it: their own model from a hostile directory, every sink, and what signals leave behind."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.ray_cluster import RayCluster
from framework import run_dir

ROOT = Path(__file__).resolve().parents[2]
HOLDFAST = str(Path(sys.executable).with_name("holdfast"))
TINY = ["model=tiny", "data=synthetic", "optim.global_batch=8", "cluster.num_nodes=2", "layout.dp=1"]

pytestmark = pytest.mark.cluster


def train(*words: str, cwd: Path, run: Path) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    command = [HOLDFAST, "train", *words, f"run_dir={run}"]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(found: Any, timeout_s: float = 150.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def steps(run: Path) -> int:
    return len(run_dir.metrics(run)) if (run / "metrics.jsonl").exists() else 0


def hostile(directory: Path) -> Path:
    """A user's directory whose names are ours, and whose modules end whoever imports them."""
    trap = "raise SystemExit('a stranger was imported')\n"
    directory.mkdir()
    for name in ("configs", "framework", "parallel"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(trap)
    (directory / "launch.py").write_text(trap)
    return directory


def wandb_records(run: Path) -> Iterator[dict[str, Any]]:
    [file] = run.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.strip())


def test_a_model_of_the_users_own_trains_from_their_directory_and_every_sink_gets_its_numbers(tmp_path: Path) -> None:
    """The example of docs/models.md. The directory holds packages of our names, which once won on workers. Paths are relative to
    it: they once were to a folder of Ray's on the side of the workers, and all that a run had left went with the cluster.
    """
    place = hostile(tmp_path / "theirs")
    run = place / "runs" / "mine"
    (place / "texts").mkdir()
    (place / "texts" / "ours.txt").write_text("\n".join(path.read_text() for path in sorted((ROOT / "framework").glob("*.py"))))
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL)
    (place / "my_model.py").write_text(example)
    sinks = ["monitor.csv=true", "monitor.tensorboard=true", "monitor.prometheus=true", "monitor.eval_samples=8", "cluster.preflight=true"]
    words = ["model._target_=my_model.Memory", "model.dim=64", "model.num_layers=4", "optim.num_steps=40"]
    words += ["data=text", "data.path=texts/", "data.seq_len=32", "fault_tolerance.durable.every_steps=20"]
    process = train(*words, "optim.global_batch=8", "cluster.num_nodes=2", "layout.dp=1", *sinks, cwd=place, run=Path("runs/mine"))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, f"{out}\n{err}"
    assert "stranger" not in err and "Traceback" not in err

    assert os.listdir(run / "checkpoints") and list((run / "logs").glob("g001_*"))
    rows = run_dir.metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 41)) and rows[-1]["loss"] < rows[0]["loss"]
    assert all(0 < row["mfu"] < 1 for row in rows)
    with (run / "metrics.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [float(row["loss"]) for row in table if row["loss"]] == [row["loss"] for row in rows]
    assert [row["step"] for row in table if row["val_loss"]] == ["40"]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "prometheus_url").read_text().startswith("http://127.")
    assert "n1 -> n0" in (run / "preflight.txt").read_text()
    started = next(event for event in run_dir.events(run) if event["kind"] == "startup")
    assert sum(started["parts"].values()) == pytest.approx(started["total_s"])

    text = json.dumps(list(wandb_records(run)))
    names = ("train/loss", "perf/mfu", "perf/tokens_per_s", "mem/rss_bytes_max", "sys/n0/free_bytes", "sys/n1/load", "trainer/step")
    assert all(name in text for name in (*names, "my_model.Memory")), [n for n in names if n not in text]


def test_the_doctor_examines_every_node_and_every_way(tmp_path: Path) -> None:
    done = subprocess.run(
        [HOLDFAST, "doctor", "cluster.num_nodes=3"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0 and "wrong: " not in done.stdout, f"{done.stdout}\n{done.stderr}"  # somebody may be slow: odd, no more
    assert re.findall(r"^(n\d -> n\d):", done.stdout, flags=re.MULTILINE) == [f"n{a} -> n{b}" for a in range(3) for b in range(3) if a != b]
    assert "torch 2.13.0" in done.stdout and "lo (" in done.stdout and "GFLOP/s" in done.stdout
    assert os.listdir(tmp_path) == []


def test_what_the_config_cannot_know_is_refused_in_one_line_too(tmp_path: Path) -> None:
    """A model that could not be imported once ended as a controller that was looked for during thirty seconds."""
    process = train(*TINY, "model._target_=my_model.Nothing", cwd=tmp_path, run=tmp_path / "run")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2, f"{out}\n{err}"
    assert err.splitlines()[-1].startswith("model._target_: must name an importable class, got 'my_model.Nothing'"), err
    assert "Traceback" not in err


def test_a_cluster_with_too_few_nodes_is_explained_in_time(tmp_path: Path) -> None:
    with RayCluster(addresses=["127.0.0.3"], num_cpus=1) as ray:
        words = [f"cluster.address={ray.address}", "cluster.num_nodes=3", "cluster.start_timeout_s=4", "cluster.workers_per_node=1"]
        command = [HOLDFAST, "train", "model=tiny", "data=synthetic", "layout.dp=1", *words, f"run_dir={tmp_path / 'run'}"]
        done = subprocess.run(command, cwd=tmp_path, env=ray.env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    explained = "cluster.num_nodes: 3 nodes with 1 CPUs each are needed, present 1 (127.0.0.3), missing 2"
    assert "trouble: waiting up to" in done.stderr and done.stderr.splitlines()[-1].startswith(f"{explained} after 4 s"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ending", ["one signal", "two signals", "killed", "without Ray's head"])
def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path: Path, ending: str) -> None:
    run = tmp_path / "run"
    process = train(*TINY, "optim.num_steps=100000", cwd=tmp_path, run=run)
    wait_for(lambda: steps(run) >= 3 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    below = psutil.Process(process.pid).children(recursive=True)
    [folder] = {w.partition("=")[2] for p in below for w in p.cmdline() if "gcs_server" in p.name() and w.startswith("--session-dir=")}
    assert Path(folder).is_dir()
    if ending == "without Ray's head":
        next(p for p in below if "gcs_server" in p.name()).kill()
    else:
        process.send_signal({"one signal": signal.SIGTERM, "two signals": signal.SIGINT, "killed": signal.SIGKILL}[ending])
    if ending == "two signals":
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == {"killed": -9, "without Ray's head": 3}.get(ending, 130), err
    wait_for(lambda: not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 30.0)
    wait_for(lambda: not Path(folder).exists() and not (Path("/dev/shm") / Path(folder).name).exists(), 30.0)
    last = run_dir.summary(run)
    if ending == "without Ray's head":  # Ray ended all that had joined it after a minute, the driver too, and nobody said a word
        assert last is not None and last["status"] == "failed" and "head" in last["reason"], last
        assert os.listdir(run / "checkpoints") and "go on with resume=" in last["reason"], "the processes that were left have saved the state"
    if ending == "one signal":
        assert last is not None and last["status"] == "interrupted" and last["steps"] == steps(run)
        assert os.listdir(run / "checkpoints"), "the state is saved on a signal"
