"""holdfast train: train a model, surviving the loss of machines.

    holdfast train [key=value ...] [flags of Hydra]

Starts a local Ray cluster, or joins one that runs, trains to `optim.num_steps`, and leaves a run directory behind.

Rule of this file: compose, decode, run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framework.cluster.local_cluster import LocalCluster
from framework.config import Config, decode
from framework.monitor.startup import Startup, command_began
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
    with _begun(arguments) as early:
        return run_composed("train", arguments, lambda values: _job(values, early))


def help_text() -> str:
    """Groups, options and flags."""
    return HELP.format(groups="".join(f"  {name:<17}{'  '.join(options)}\n" for name, options in groups().items()))


def config_of(values: dict[str, Any]) -> Config:
    """The decoded config; a run without a directory of its own gets a new one. Its path is the same for every process."""
    place = values.get("run_dir") or new_run_dir()
    return decode(values | {"run_dir": str(Path(place).absolute()) if isinstance(place, str) else place})


def _job(values: dict[str, Any], early: LocalCluster | None) -> int:
    startup = Startup(command_began())
    config = config_of(values)
    startup.mark("config")
    if early is not None and config.cluster.address != "local":
        early.close()
        early = None
    from framework.driver import run  # after the config is known to be right, for it brings Ray

    return run(config, startup=startup, early=early)


@contextmanager
def _begun(arguments: Sequence[str]) -> Iterator[LocalCluster | None]:
    """A local cluster whose processes import while this one reads its config; ended should that be wrong.

    None where the command line asks for something else than one run on a local cluster.
    """
    other = any(word.startswith(("-", "cluster=", "cluster.address=")) for word in arguments)
    early = None if other else LocalCluster.begin()
    try:
        yield early
    finally:
        if early is not None:
            early.close()
