"""The record is read from bytes that may be torn, lapped or foreign."""

from __future__ import annotations

import os

import numpy as np
import pytest

from parallel.record import HEADER, HEADER_BYTES, MAGIC, SLOT, Group, Op, Phase, State, decode, group_line
from parallel.ring import RingReader, create, process_state, ring_bytes

GROUPS = (Group(7, "dp", (1, 3, 5)), Group(9, "odd", (4, 0, 2)))


def _ring(slots: list[dict[str, int]], *, head: int | None = None) -> bytes:
    table = "".join(group_line(group) + "\n" for group in GROUPS).encode()
    array = np.zeros(max(64, len(slots)), SLOT)
    for at, slot in enumerate(slots):
        filled = {"stamp": at + 1, "call": 100 + at, "op": int(Op.ALLREDUCE), "peer": -1, "group": 7} | slot
        for key, value in filled.items():
            array[at][key] = value
    header = bytearray(HEADER_BYTES)
    count = len(slots) if head is None else head
    HEADER.pack_into(header, 0, MAGIC, len(array), len(table), 3, 42, 0, 5_000, 1_000, count, 6, 1, 90, len(table), 2)
    return bytes(header) + table + array.tobytes()


def test_what_a_rank_noted_is_read_back():
    ring = decode(_ring([{"seq": 4, "bytes": 8, "wait": 110, "end": 120, "state": 1, "step": 6, "phase": 1}]))
    (record,) = ring.records
    assert (ring.rank, ring.pid, ring.generation, ring.head, ring.step, ring.phase) == (3, 42, 2, 1, 6, Phase.TRAIN)
    assert (record.op, record.seq, record.bytes, record.state, record.step) == (Op.ALLREDUCE, 4, 8, State.DONE, 6)
    assert (record.call_ns, record.wait_ns, record.end_ns) == (100, 110, 120)
    assert ring.realtime_offset_ns == 4_000


def test_peers_are_world_ranks():
    ring = decode(_ring([{"op": int(Op.SEND), "peer": 2}, {"op": int(Op.RECV), "peer": 0, "group": 9}]))
    assert [record.peer for record in ring.records] == [5, 4]


def test_groups_survive_their_line_in_progression_or_not():
    assert dict(decode(_ring([])).groups) == {group.id: group for group in GROUPS}


def test_torn_slots_are_left_out():
    ring = decode(_ring([{}, {"stamp": 0}, {"op": 77}, {"call": 0}, {}]))
    assert [record.ticket for record in ring.records] == [0, 4]


def test_a_lapped_ring_comes_in_the_order_of_the_calls():
    ring = decode(_ring([{"stamp": 67}, {"stamp": 68}, {"stamp": 65}, {"stamp": 66}], head=68))
    assert [record.ticket for record in ring.records] == [64, 65, 66, 67]


def test_a_foreign_file_is_refused():
    with pytest.raises(ValueError, match="header of a ring"):
        decode(b"\0" * 4096)


def test_a_cut_file_gives_the_slots_that_are_whole():
    assert len(decode(_ring([{}, {}, {}])[: -SLOT.itemsize * 62 - 10]).records) == 1


def test_a_reader_hands_out_only_news_and_what_was_open(tmp_path):
    fd = create("ring", directory=tmp_path, num_slots=64)
    done, running = {"state": 1, "end": 200}, {"state": 0}

    def write(slots: list[dict[str, int]]) -> None:
        os.pwrite(fd, _ring(slots), 0)

    reader = RingReader(tmp_path / "ring")
    assert reader.read() == b""
    write([done, running, done])
    assert [r.ticket for r in decode(reader.read()).records] == [0, 1, 2]
    write([done, done, done, done])
    assert [(r.ticket, r.open) for r in decode(reader.read()).records] == [(1, False), (2, False), (3, False)]
    assert decode(reader.read()).records == ()
    assert len(decode(reader.read(whole=True)).records) == 4


def test_a_reader_that_reads_only_what_is_new_misses_nothing_where_the_ring_goes_round(tmp_path):
    fd = create("ring", directory=tmp_path, num_slots=64)
    reader, seen, head = RingReader(tmp_path / "ring"), [], 0
    for count in (40, 40, 1, 0, 63, 64, 200):
        head += count
        newest = {ticket % 64: ticket for ticket in range(max(0, head - 64), head)}
        slots = [{"stamp": newest[at] + 1 if at in newest else 0, "state": 1} for at in range(64)]
        os.pwrite(fd, _ring(slots, head=head), 0)
        found = [record.ticket for record in decode(reader.read()).records]
        assert found == list(range(max(head - count, head - 64), head))
        seen += found
    assert seen == sorted(set(seen))


def test_a_reader_knows_a_dead_process_from_one_with_its_number():
    mine = process_state(os.getpid(), 0)
    assert mine[1] == b"R" and mine[0] > 0
    assert process_state(os.getpid(), 1)[1] == b"X"
    assert process_state(2**22 + 1, 0)[1] == b"X"


def test_a_ring_has_a_power_of_two_of_slots():
    assert ring_bytes(64) < ring_bytes(128)
    with pytest.raises(ValueError, match="power of two"):
        ring_bytes(100)
