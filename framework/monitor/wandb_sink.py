"""W&B, in a process of its own: whatever happens to it, training does not notice.

    sink (a thread of the controller) --JSON lines--> pipe --> child: wandb.init, run.log ... --> run_dir/wandb/
                                                       end of file: run.finish()

A child costs no import time at the start, holds no lock of ours while it pickles, can be killed when it hangs, and
still closes its run when the controller is SIGKILLed, because the pipe then ends. A child that died is started again
under the same run id. All numbers are logged against `trainer/step`, so that steps which are done again after a
roll-back are recorded instead of dropped.

Rule of this file: the only one that imports wandb, and only in the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from framework.cluster.checkout import ROOT
from framework.cluster.host import BESIDE_NICENESS, stand_back
from framework.monitor.telemetry import Entry, Happening
from framework.run_dir import clean

QUIET = {"WANDB_ERROR_REPORTING": "false"}  # what W&B measures of its own calls takes longer than they do
CLOSE_S = 300.0  # whoever closes the telemetry sets the real deadline, and then abandons


class WandbSink:
    """A W&B run `run_id` below `directory`. `mode`: offline or online; online takes its key from the environment."""

    def __init__(
        self,
        *,
        directory: str | Path,
        run_id: str,
        mode: str,
        project: str,
        name: str,
        entity: str | None,
        config: Mapping[str, Any],
    ) -> None:
        self._log = Path(directory) / "logs" / "wandb.log"
        where = {"dir": str(Path(directory).resolve()), "id": run_id, "mode": mode, "project": project}
        self._first: dict[str, Any] = where | {"name": name, "entity": entity, "config": dict(config)}
        self._child: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        self.abandon()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "framework.monitor.wandb_sink"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=QUIET | os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,  # Ctrl-C is for the controller; the child ends when the pipe does
            )
        self._send(self._first)

    def write(self, entry: Entry) -> None:
        if isinstance(entry, Happening):
            self._send({"event": entry.row})
        else:
            self._send({"step": entry.step, "values": entry.values})

    def close(self) -> None:
        if self._child is None or self._child.stdin is None:
            return
        self._child.stdin.close()
        if self._child.wait(CLOSE_S) != 0:
            raise RuntimeError(f"the W&B process ended with code {self._child.returncode}; see {self._log}")

    def abandon(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._child is not None and self._child.stdin is not None
        if self._child.poll() is not None:
            raise ConnectionResetError(f"the W&B process ended with code {self._child.returncode}; see {self._log}")
        self._child.stdin.write(json.dumps(clean(message)).encode() + b"\n")
        self._child.stdin.flush()


def serve(lines: Iterable[bytes]) -> None:
    """The child: the first line opens the run, each further one is logged, the end closes it."""
    messages = (json.loads(line) for line in lines)
    first = next(messages, None)
    if first is None:
        return
    run = _start(first)
    for message in messages:
        _log(run, message)
    run.finish()


def _start(first: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True)
    names = {key: first[key] for key in ("dir", "id", "mode", "project", "name", "entity", "config")}
    run = wandb.init(**names, resume="allow", settings=settings)
    run.define_metric("trainer/step", hidden=True)
    run.define_metric("*", step_metric="trainer/step")
    return run


def _log(run: Any, message: Mapping[str, Any]) -> None:
    event = message.get("event")
    if event is None:
        run.log({"trainer/step": message["step"], **message["values"]})
        return
    numbers = {
        key: value for key, value in event.items() if isinstance(value, int | float) and key not in ("step", "time")
    }
    named = {f"event/{event['kind']}/{key}": value for key, value in numbers.items()}
    run.log({"trainer/step": event.get("step", 0), f"event/{event['kind']}": 1, **named})
    run.summary[f"last_{event['kind']}"] = event.get("reason", "")


def _own_stdin() -> BinaryIO:
    """Standard input as a file that W&B's own process does not inherit, so that its end and ours are seen at once."""
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return os.fdopen(pipe, "rb")


if __name__ == "__main__":
    stand_back(BESIDE_NICENESS)
    serve(_own_stdin())
