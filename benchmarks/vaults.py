"""Vaults of emulated nodes, each a process of its own, for as long as a benchmark needs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def vaults(nodes: Sequence[str], *, run: str, secret: bytes) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Their addresses by node, and their processes' ids."""
    processes = [_vault(node, run, secret) for node in nodes]
    try:
        addresses = {node: json.loads(vault.stdout.readline())["address"] for node, vault in zip(nodes, processes, strict=True)}  # type: ignore[union-attr]
        yield addresses, [vault.pid for vault in processes]
    finally:
        for vault in processes:
            vault.stdin.close()  # type: ignore[union-attr]
            vault.wait(30)


def _vault(node: str, run: str, secret: bytes) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fault_tolerance.snapshots.vault", "--node", node, "--run", run]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    vault = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert vault.stdin is not None
    vault.stdin.write(secret.hex() + "\n")
    vault.stdin.flush()
    return vault
