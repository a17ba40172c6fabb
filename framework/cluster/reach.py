"""Reach: how another command finds the cluster of a run that is going on.

    holdfast train --writes--> <run_dir>/control/cluster.json --reads--> holdfast cluster
                               gone when the run has ended

Rule of this file: a small file, and what can be asked of the machines behind it. Ray is reached by `ray_session.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from framework.cluster.machines import Machines
from framework.cluster.nodes import ClusterError

FILE = "control/cluster.json"


@dataclass(frozen=True, slots=True)
class Reach:
    """The address of a run's Ray, and the control socket of its emulated machines, if it has such."""

    address: str
    control: str | None

    @property
    def machines(self) -> Machines:
        """The emulated machines. Raises ClusterError for a cluster of real ones."""
        if self.control is None:
            raise ClusterError(
                f"cluster: must be an emulated one (cluster.address=local), got the Ray at {self.address}; "
                "use ray start, ray stop and ray drain-node there"
            )
        return Machines(self.control)

    def drain(self, node: str, *, deadline_s: float) -> None:
        """Notice through Ray, as a cloud gives it; the emulated machine is gone when the time is over. Raises ClusterError."""
        machines = self.machines
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(Path(machines.control).parent / "token"))
        from framework.cluster.ray_session import give_notice, node_id  # Ray takes a second to import

        give_notice(self.address, node_id(self.address, node), deadline_s=deadline_s)
        machines.later(deadline_s, "kill", node)


@contextmanager
def reachable(run_dir: str, reach: Reach) -> Iterator[None]:
    """Let other commands find the cluster for as long as this lasts."""
    file = Path(run_dir) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps(asdict(reach)))
    aside.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def reach_of(run_dir: str | Path) -> Reach:
    """The cluster of a run. Raises ValueError if the run is not going on."""
    try:
        return Reach(**json.loads((Path(run_dir) / FILE).read_text()))
    except FileNotFoundError:
        raise ValueError(f"{run_dir}: must be the directory of a run that is going on, got one without {FILE}; see runs/") from None
