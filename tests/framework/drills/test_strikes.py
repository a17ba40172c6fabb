"""Strikes from outside: their moments are read from a run's files, and signals reach the processes they are meant for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from framework.drills.strikes import Strike, Striker, drawn, left_behind, reached
from framework.run_dir import RunDir


def test_a_moment_is_read_from_the_files_of_a_run(tmp_path: Path) -> None:
    assert reached(tmp_path, "start") and not reached(tmp_path, "step 1") and not reached(tmp_path, "plan 1")
    run = RunDir(tmp_path)
    run.metric({"step": 4})
    for _ in range(2):
        run.event("plan", step=0, generation=1, reason="")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # a line that is being written
    assert reached(tmp_path, "step 4") and not reached(tmp_path, "step 5")
    assert reached(tmp_path, "plan 2") and not reached(tmp_path, "plan 3") and not reached(tmp_path, "crew 1")


def test_the_same_seed_draws_the_same_strikes_and_never_more_nodes_than_may_be_lost() -> None:
    for seed in range(200):
        strikes = drawn(seed, num_steps=40, nodes=4, slots=2, tolerate=2)
        assert strikes == drawn(seed, num_steps=40, nodes=4, slots=2, tolerate=2)
        dead = {s.target for s in strikes if s.kind == "kill_node"}
        assert 1 <= len(dead) <= 2
        assert not dead & {s.target.partition(".")[0] for s in strikes if s.kind == "kill_worker"}


def test_a_strike_meets_the_process_that_writes_the_log_of_its_target(tmp_path: Path) -> None:
    sleeper = "import subprocess, sys\nfor log in sys.argv[1:]: subprocess.Popen(['sleep', '60'], stdout=open(log, 'w'))\ninput()"
    (tmp_path / "logs").mkdir()
    logs = [str(tmp_path / "logs" / name) for name in ("g002_r003_n1.0.log", "g002_r004_n1.1.log", "agent_n1.log")]
    driver = subprocess.Popen(
        [sys.executable, "-c", sleeper, *logs], stdin=subprocess.PIPE, env={**os.environ, "HOLDFAST_CONTROL": "/nowhere/control"}
    )
    strikes = (Strike("start", 0.0, "kill_worker", "n1.0"), Strike("start", 0.1, "terminate"))
    try:
        while any(not Path(log).exists() for log in logs):
            time.sleep(0.01)
        with Striker(driver.pid, tmp_path, strikes) as striker:
            assert driver.wait(20.0) == -signal.SIGTERM
        worker, told = striker.hits
        assert len(worker.pids) == 1 and told.pids == (driver.pid,)
        rest = [int(text.split()[1]) for text in left_behind("/nowhere/control") if text.startswith("process")]
        assert len(rest) == 2 and worker.pids[0] not in rest
    finally:
        for text in left_behind("/nowhere/control"):
            os.kill(int(text.split()[1]), signal.SIGKILL)
        driver.wait()
