"""The housekeeper's rounds: what they cost. What scrubbing finds and mends is tried on real vaults in `test_vault.py`."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from fault_tolerance.snapshots.scrub import Housekeeper

CHUNKS = 5


def vault(*, bad: bool, closed: bool = False) -> tuple[Any, list[int]]:
    """A vault that holds one version of one block, and the chunks that are looked at, in order."""
    looked: list[int] = []
    plan = SimpleNamespace(chunk_bytes=100, num_chunks=lambda nbytes: CHUNKS)
    version = SimpleNamespace(plan=plan, data=object(), parity=None, dropped=False, blocks=lambda: [("data", 0)], real_bytes=lambda kind, index: 480)
    version.bad = {("data", 0, chunk) for chunk in range(CHUNKS)} if bad else set()
    version.check = lambda kind, index, chunk: looked.append(chunk) or True
    pinned = SimpleNamespace(__enter__=lambda: None, __exit__=lambda *_: None)
    pool = SimpleNamespace(pinned=lambda segment: pinned)
    over = threading.Event()
    if closed:
        over.set()
    return SimpleNamespace(changed=threading.Condition(), versions={(1, 3): version}, closed=over, data_pool=pool), looked


def test_a_round_ends_where_all_that_is_held_is_known_to_be_bad() -> None:
    """A chunk that could not be mended counted as one byte: with a budget of 200 MB a tick the thread turned for twenty minutes,
    with the vault's lock in its hand, and everything in its process crept.
    """
    held, looked = vault(bad=True)
    rounds = threading.Thread(target=Housekeeper(held).scrub, args=(1e12,), daemon=True)
    rounds.start()
    rounds.join(30)
    assert not rounds.is_alive() and looked == []


def test_no_chunk_is_read_twice_in_a_tick_and_the_next_tick_goes_on_where_this_one_ended() -> None:
    held, looked = vault(bad=False)
    keeper = Housekeeper(held)
    keeper.scrub(1e12)
    assert looked == list(range(CHUNKS))
    looked.clear()
    keeper.scrub(150)
    keeper.scrub(150)
    assert looked == [0, 1, 2, 3]


def test_a_vault_that_closes_is_not_scrubbed_on() -> None:
    held, looked = vault(bad=False, closed=True)
    Housekeeper(held).scrub(1e12)
    assert looked == []
