"""The controller's view of vaults, when the nodes that they stand for come and go. Real vaults, in this process."""

from __future__ import annotations

from typing import Any

from fault_tolerance.vault import Vault
from framework.config import decode
from framework.memory import Memory
from framework.planner import Planner
from launch.compose import compose

SECRET = "00" * 16


class StandIn:
    """What stands for a node: an agent's handle, of which only the address is asked."""

    def __init__(self, vault: Vault) -> None:
        self._address = vault.address

    def call(self, method: str) -> Any:
        assert method == "address"
        return self

    def result(self, _: float) -> str:
        return self._address


def test_a_node_that_left_and_came_back_between_two_looks_is_asked_where_its_vault_is_now() -> None:
    """A node left on notice, its vault ended, the node joined again: three generations in a row called the vault that was
    no more, and the run ended without progress.
    """
    config = decode(compose(["model=tiny", "data=synthetic", "run_dir=none"]))
    memory = Memory(config, run_id="again", secret=SECRET, atlas=Planner(config).atlas)
    first = Vault(node="n1", run="again", secret=bytes.fromhex(SECRET))
    first.start()
    memory.look({"n1": StandIn(first)})  # type: ignore[dict-item]
    first.close()
    second = Vault(node="n1", run="again", secret=bytes.fromhex(SECRET))
    second.start()
    try:
        second.raise_fence(7)
        memory.look({"n1": StandIn(second)})  # type: ignore[dict-item]
        assert memory.generation == 7
    finally:
        memory.forget("n1")
        second.close()
