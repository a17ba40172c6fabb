"""Record: what a rank noted about every operation it had with others, read from the bytes of its ring.

    | header 256 B | groups, one JSON line each | slots of 64 B: one operation, or one mark of the trainer |

    call_ns     wait_ns         end_ns            all on the rank's own monotonic clock; 0 = not yet
    ---|-----------|===============|----->
    issued     the rank blocks    complete        [wait_ns, end_ns] is time the rank was made to wait

A ring is read while it is written, by somebody else, perhaps after its writer died: a slot that is torn is left out, and
so is one that makes no sense. `Ring.head` tells how many there should be.

Rule of this file: bytes in, values out. The layout is `recorder.cpp`'s; a test compares the two.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

MAGIC = int.from_bytes(b"HLFRING1", "little")
HEADER_BYTES = 256
# magic, slots, table bytes, rank, pid, start ticks, realtime, monotonic, head, step, phase, mark, table used, generation
HEADER = struct.Struct("<QIIiIQqqQIIqII")
SEEN_AT = 128  # what a reader adds to its copy of the header:
SEEN = struct.Struct("<qqc")  # when it read, the processor time of the rank so far, the state of its process
SLOT_FIELDS = {
    "stamp": "Q", "group": "I", "seq": "I", "peer": "i", "op": "B", "dtype": "B", "state": "B", "phase": "B", "bytes": "Q", "shape": "I",
    "step": "I", "call": "q", "wait": "q", "end": "q",
}  # fmt: skip
SLOT_FORM = struct.Struct("<" + "".join(SLOT_FIELDS.values()))
SLOT = np.dtype([(name, f"<{code}") for name, code in SLOT_FIELDS.items()])


class Op(IntEnum):
    """The operation; numbers below 200 are c10d's own."""

    BROADCAST = 0
    ALLREDUCE = 1
    ALLREDUCE_COALESCED = 2
    REDUCE = 3
    ALLGATHER = 4
    ALLGATHER_BASE = 5
    ALLGATHER_COALESCED = 6
    GATHER = 7
    SCATTER = 8
    REDUCE_SCATTER = 9
    ALLTOALL_BASE = 10
    ALLTOALL = 11
    SEND = 12
    RECV = 13
    RECV_ANY = 14
    BARRIER = 15
    REDUCE_SCATTER_BASE = 16
    COALESCED = 17
    ALLREDUCE_SPARSE = 18
    REDUCE_SCATTER_COALESCED = 19
    MARK = 200
    MONITORED_BARRIER = 201


TRANSFERS = frozenset({Op.SEND, Op.RECV, Op.RECV_ANY})


class State(IntEnum):
    """How an operation stands."""

    CALLED = 0
    DONE = 1
    FAILED = 2
    ABORTED = 3


class Phase(IntEnum):
    """What the trainer said it is doing. Only TRAIN is expected to be regular."""

    START = 0
    TRAIN = 1
    EVALUATE = 2
    SNAPSHOT = 3
    CHECKPOINT = 4
    COMPILE = 5
    IDLE = 6


class Record(NamedTuple):
    """One operation of one rank. `peer` is a world rank: the other end of a transfer, or the root; -1 where none.

    `seq` counts the collectives of a group, or the transfers of a pair in one direction, so that records of different
    ranks with the same (group, seq) are the same operation. `shape` is 0 where ranks need not agree on it. The `bytes` of
    a mark are the nanoseconds that the marking thread has ever been ready to run and had no processor.
    """

    ticket: int
    group: int
    seq: int
    op: Op
    peer: int
    dtype: int
    bytes: int
    shape: int
    state: State
    phase: Phase
    step: int
    call_ns: int
    wait_ns: int
    end_ns: int

    @property
    def open(self) -> bool:
        """Issued and not complete."""
        return self.state == State.CALLED

    @property
    def is_collective(self) -> bool:
        """Neither a transfer between two ranks nor a mark."""
        return self.op not in TRANSFERS and self.op != Op.MARK


@dataclass(frozen=True, slots=True)
class Group:
    """A process group: `ranks` are world ranks in group order."""

    id: int
    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ring:
    """One rank's ring as it was at `read_ns`, on the clock of the rank's node.

    `records` are in the order of their tickets, which is the order of the calls. `process` is the state letter of Linux
    (`T` stopped, `Z` dead and unburied), `X` where there is no such process any more, `?` where nobody looked.
    """

    rank: int
    pid: int
    generation: int
    head: int
    step: int
    phase: Phase
    mark_ns: int
    read_ns: int
    realtime_offset_ns: int
    cpu_ns: int
    process: str
    groups: Mapping[int, Group]
    records: tuple[Record, ...]

    @property
    def dead(self) -> bool:
        """The process is gone."""
        return self.process in ("X", "Z")


def decode(data: bytes | bytearray | memoryview) -> Ring:
    """The ring in these bytes, a whole file or what `ring.RingReader` handed out. Raises ValueError if it is none."""
    if len(data) < HEADER_BYTES or HEADER.unpack_from(data)[0] != MAGIC:
        raise ValueError(
            "record: must start with the header of a ring, got something else; was the recorder installed?"
        )
    (_, slots, table_bytes, rank, pid, _, realtime, monotonic, head, step, phase, mark, used, generation) = (
        HEADER.unpack_from(data)
    )
    read_ns, cpu_ns, process = SEEN.unpack_from(data, SEEN_AT)
    groups = _groups(bytes(data[HEADER_BYTES : HEADER_BYTES + min(used, table_bytes)]))  # nearly always those of the reading before
    start = HEADER_BYTES + table_bytes
    count = min(slots, max(0, len(data) - start) // SLOT.itemsize)
    records = _records(memoryview(data)[start : start + count * SLOT.itemsize], groups)
    latest = max([mark, monotonic] + [max(r.call_ns, r.end_ns) for r in records[-64:]])
    return Ring(
        rank=rank,
        pid=pid,
        generation=generation,
        head=head,
        step=step,
        phase=_phase(phase),
        mark_ns=mark,
        read_ns=read_ns or latest,
        realtime_offset_ns=realtime - monotonic,
        cpu_ns=cpu_ns,
        process=process.decode("ascii", "replace") if process != b"\0" else "?",
        groups=groups,
        records=records,
    )


def group_line(group: Group) -> str:
    """The line that tells a group in the ring's table; ranks in arithmetic progression are told by three numbers."""
    ranks = group.ranks
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if step > 0 and ranks == tuple(range(ranks[0], ranks[0] + step * len(ranks), step)):
        told: object = {"first": ranks[0], "step": step, "count": len(ranks)}
    else:
        told = list(ranks)
    return json.dumps({"id": group.id, "name": group.name, "ranks": told}, separators=(",", ":"))


@lru_cache(maxsize=1024)
def _groups(table: bytes) -> Mapping[int, Group]:
    groups = {}
    for line in table.split(b"\n")[:-1]:
        told = json.loads(line)
        ranks = told["ranks"]
        if isinstance(ranks, dict):
            ranks = range(ranks["first"], ranks["first"] + ranks["step"] * ranks["count"], ranks["step"])
        groups[told["id"]] = Group(told["id"], told["name"], tuple(ranks))
    return MappingProxyType(groups)


_OPS = {int(op): op for op in Op}
_STATES = {int(state): state for state in State}
_PHASES = {int(phase): phase for phase in Phase}


def _phase(number: int) -> Phase:
    return _PHASES.get(number, Phase.IDLE)


def _records(slots: memoryview, groups: Mapping[int, Group]) -> tuple[Record, ...]:
    """In plain Python: a reading has few slots, and for each array operation there would be more to do than for a slot."""
    found = [_record(slot, groups) for slot in SLOT_FORM.iter_unpack(slots) if slot[0] > 0 and slot[11] > 0 and slot[4] in _OPS]
    return tuple(sorted(found, key=itemgetter(0)))


def _record(slot: tuple[int, ...], groups: Mapping[int, Group]) -> Record:
    stamp, group, seq, peer, op, dtype, state, phase, size, shape, step, call, wait, end = slot
    members = groups[group].ranks if group in groups else ()
    return Record(
        stamp - 1,
        group,
        seq,
        _OPS[op],
        members[peer] if 0 <= peer < len(members) else -1,
        dtype,
        size,
        shape,
        _STATES.get(state, State.FAILED),
        _phase(phase),
        step,
        call,
        wait,
        end,
    )
