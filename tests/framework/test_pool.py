"""The pool against a cluster whose nodes die at the wrong moment. Real processes: `test_cluster.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from framework.nodes import ClusterError
from framework.pool import Pool, PoolError


class Dying:
    """A cluster of n0 and n1, where n1 is listed as alive, and is not when something is started on it."""

    def nodes(self) -> list[Any]:
        return [SimpleNamespace(name=name, ip="127.0.0.1", alive=True) for name in ("n0", "n1")]

    def vaults(self) -> dict[str, Any]:
        return {}

    def workers(self) -> dict[str, Any]:
        return {}

    def call_context(self) -> dict[str, Any]:
        return {"version": "1", "digest": "d"}

    def start_vault(self, node: str, *_: object, **__: object) -> Any:
        if node == "n1":
            raise ClusterError("node: must be alive, got n1; alive are n0")
        return SimpleNamespace(ready=lambda: "call")

    def start_worker(self, node: str, *_: object, **__: object) -> Any:
        return self.start_vault(node)


def test_a_node_that_dies_while_its_workers_are_started_is_the_pool_s_trouble() -> None:
    """A killed node came back, was listed, and was gone again: ClusterError went through the controller and ended the run."""
    pool = Pool(Dying(), logs="/nowhere", agent={}, worker={})  # type: ignore[arg-type]
    pool.start(["n0.0", "n1.0"])
    assert set(pool.workers) == {"n0.0"}
    assert set(pool.agents) == {"n0"}
    with pytest.raises(PoolError, match=r"nodes of n1\.0 must be alive"):
        pool.ensure(["n0.0", "n1.0"], timeout_s=1.0)
