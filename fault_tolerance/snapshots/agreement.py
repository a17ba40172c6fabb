"""Agreement: when a version is protected everywhere, one vault says so; then the one before may go.

    every vault   --coded-->      coordinator          all of them: `protected`; one that failed: `abandon`
    every vault   <--protected--  coordinator          tried again until it is heard or the generation is over

Only the freeing of older versions needs this. A coordinator that dies in between frees nothing, and what exists can be
read all the same, because nobody's word is needed for that (`catalogue.py`).

Rule of this file: the two messages. What they mean for a version is the vault's matter.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from fault_tolerance.snapshots.encoder import request
from fault_tolerance.snapshots.version import Version
from fault_tolerance.snapshots.wire import Refused, WireError

if TYPE_CHECKING:
    from fault_tolerance.snapshots.vault import Vault

TRIES = 5


class Agreement:
    """One vault's part in it, as a reporter or as the coordinator."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def report(self, version: Version, failure: str) -> None:
        """Tell the coordinator how this vault's part ended: well if `failure` is empty. Raises WireError, Refused."""
        coordinator = version.plan.coordinator
        if coordinator == self._vault.node:
            self.heard(version, coordinator, failure)
        else:
            self._vault.peers.call(coordinator, request("coded", version) | {"failure": failure})

    def heard(self, version: Version, node: str, failure: str) -> None:
        """As coordinator: a vault's report."""
        with self._vault.changed:
            version.coded_nodes.add(node)
            complete = not failure and version.coded_nodes >= set(version.plan.members)
        if failure:
            self.announce(version, "abandon", f"node {node}: {failure}")
        elif complete:
            self.announce(version, "protected", "")

    def announce(self, version: Version, verdict: str, reason: str) -> None:
        """As coordinator: settle it here, and tell the others in the background."""
        if not self._vault.wanted(version):
            return
        self._vault.settle(version, verdict, reason)
        message = request(verdict, version) | {"reason": reason}
        for node in version.plan.members:
            if node != self._vault.node:
                arguments = (node, message, version)
                threading.Thread(target=self._tell, args=arguments, daemon=True, name="announce").start()

    def _tell(self, node: str, message: dict[str, Any], version: Version) -> None:
        for attempt in range(TRIES):
            try:
                self._vault.peers.call(node, message)
                return
            except Refused:
                return  # it has gone on without us
            except WireError:
                if self._vault.closed.wait(0.2 * 2**attempt) or version.plan is not self._vault.plan:
                    return
