"""holdfast train: train a model, surviving the loss of machines.

    holdfast train [key=value ...] [flags of Hydra]

Starts a local Ray cluster, or joins one that runs, trains to `optim.num_steps`, and leaves a run directory behind.

Rule of this file: compose, decode, run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from framework.config import Config, decode
from framework.run_dir import new_run_dir
from launch.compose import groups, run_composed

HELP = """
groups (choose an option with group=option):
{groups}
Every value can be overridden: optim.lr=3e-4 model.num_layers=8 'drill.faults=[{{step: 9, kind: kill_node, node: n1}}]'
Your own options: put experiment/mine.yaml below a folder and say --config-dir FOLDER experiment=mine

flags:
  --cfg job        print the composed config and stop
  --multirun, -m   one run for each value of key=a,b,c
  --config-dir D   look for options in folder D as well
  --info, --package, --resolve, --shell-completion: as Hydra's"""


def main(arguments: Sequence[str]) -> int:
    """Run it and give the exit code: 0 finished, 2 user error, 3 unrecoverable, 4 no progress, 130 interrupted."""
    if "-h" in arguments or "--help" in arguments:
        print((__doc__ or "") + help_text())
        return 0
    return run_composed("train", arguments, _job)


def help_text() -> str:
    """Groups, options and flags."""
    return HELP.format(groups="".join(f"  {name:<17}{'  '.join(options)}\n" for name, options in groups().items()))


def config_of(values: dict[str, Any]) -> Config:
    """The decoded config; a run without a directory of its own gets a new one."""
    return decode(values | {"run_dir": values.get("run_dir") or new_run_dir()})


def _job(values: dict[str, Any]) -> int:
    config = config_of(values)
    from framework.driver import run  # after the config is known to be right: it brings PyTorch and Ray

    return run(config)
