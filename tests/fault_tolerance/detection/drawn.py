"""Drawn timelines: what the rings would hold if ranks ran a program with these delays, on clocks of their own.

A program is a list of actions a rank takes in order; sends go out at once, receives and collectives wait. A layout's step
is built from its schedule, so that bubbles and chains of waiting arise by themselves. `Drawing.rings(at_s)` is what a
reader sees at that moment: later records are not there, running operations are open, some records may be lost.
"""

from __future__ import annotations

import random
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from parallel.layout import Layout
from parallel.record import Group, Op, Phase, Record, Ring, State

Action = tuple  # ("mark", step, phase) ("compute", s) ("meet", ranks, bytes[, op]) ("send", to, bytes) ("recv", from, bytes) ("stop",)
MS = 1e-3


@dataclass
class Event:
    """A record with true times, of which a rank's clock shows something else."""

    op: Op
    group: int
    seq: int
    peer: int
    bytes: int
    step: int
    phase: Phase
    call: float
    wait: float
    end: float | None
    shape: int = 0


@dataclass
class Over:
    """What will not change any more of a rank's ring, as of the newest look."""

    at: float = 0.0
    count: int = 0
    mark: tuple[int, Phase, float] = (0, Phase.START, 0.0)
    records: list[Record] = field(default_factory=list)


@dataclass
class Drawing:
    """The events of all ranks."""

    world: int
    events: dict[int, list[Event]]
    groups: dict[int, Group]
    skew: dict[int, float]
    busy_s: float  # when the last rank stopped doing anything
    end_s: float
    lost: float = 0.0
    seed: int = 0
    process: dict[int, str] = field(default_factory=dict)
    noted: dict[int, list[Record | None]] = field(default_factory=dict)
    over: dict[int, Over] = field(default_factory=dict)

    def rings(self, at_s: float | None = None) -> dict[int, Ring]:
        at = self.end_s if at_s is None else at_s
        return {rank: self._ring(rank, at) for rank in range(self.world)}

    def _ring(self, rank: int, at: float) -> Ring:
        over = self.over.get(rank, Over())
        if at < over.at:
            over = Over()
        self.over[rank], over.at = over, at
        step, phase, mark = over.mark
        records, noted, gapless = [], self._noted(rank), True
        count = bisect_right(self.events[rank], at, key=lambda e: e.call)
        for number in range(over.count, count):
            event, record = self.events[rank][number], noted[number]
            if event.op == Op.MARK:
                step, phase, mark = event.step, event.phase, event.call
            done = event.end is not None and event.end <= at
            if gapless and done:
                over.count, over.mark = number + 1, (step, phase, mark)
                over.records += [record] if record is not None else []
                continue
            gapless = False
            if record is not None:
                wait = record.wait_ns if event.wait <= at else 0
                records.append(record if done else record._replace(state=State.CALLED, wait_ns=wait, end_ns=0))
        return Ring(
            rank=rank,
            pid=100 + rank,
            generation=0,
            head=count,
            step=step,
            phase=phase,
            mark_ns=self._ns(rank, mark),
            read_ns=self._ns(rank, at),
            realtime_offset_ns=0,
            cpu_ns=0,
            process=self.process.get(rank, "S"),
            groups=self.groups,
            records=(*over.records, *records),
        )

    def _ns(self, rank: int, true: float) -> int:
        return int((true + self.skew[rank] + 1000) * 1e9)

    def _noted(self, rank: int) -> list[Record | None]:
        """What is noted of each event once it is over; None if it is lost."""
        if rank not in self.noted:
            dice = random.Random(self.seed * 1000 + rank)
            self.noted[rank] = [
                self._record(rank, ticket, event) if dice.random() >= self.lost else None
                for ticket, event in enumerate(self.events[rank])
            ]
        return self.noted[rank]

    def _record(self, rank: int, ticket: int, e: Event) -> Record:
        return Record(
            ticket=ticket,
            group=e.group,
            seq=e.seq,
            op=e.op,
            peer=e.peer,
            dtype=6,
            bytes=e.bytes,
            shape=e.shape,
            state=State.DONE if e.end is not None else State.CALLED,
            phase=e.phase,
            step=e.step,
            call_ns=self._ns(rank, e.call),
            wait_ns=0 if e.op == Op.MARK else self._ns(rank, e.wait),
            end_ns=0 if e.end is None else self._ns(rank, e.end),
        )


@cache
def group_id(ranks: tuple[int, ...]) -> int:
    return zlib.crc32(str(ranks).encode())


def draw(
    programs: list[list[Action]],
    *,
    wire: Callable[[tuple[int, ...], int, int], float | None] = lambda ends, size, step: 0.2 * MS,
    skew_s: float = 5.0,
    lost: float = 0.0,
    seed: int = 0,
    after_s: float = 60.0,
) -> Drawing:
    """Run the programs. `wire(ends, bytes, step)` is the time on the way, None for ever; ranks that
    stop or starve stay so for `after_s`."""
    world = len(programs)
    dice = random.Random(seed)
    at, clock, step, phase = [0] * world, [0.0] * world, [0] * world, [Phase.START] * world
    events: dict[int, list[Event]] = {r: [] for r in range(world)}
    everyone = tuple(range(world))
    groups: dict[int, Group] = {group_id(everyone): Group(group_id(everyone), "world", everyone)}
    receiving: dict[int, Event] = {}
    counts: dict[tuple[int, object], int] = defaultdict(int)
    arrived: dict[tuple[int, int], dict[int, Event]] = defaultdict(dict)
    mail: dict[tuple[int, int, int], float] = {}
    waiting: dict[int, tuple[tuple[int, ...], Event]] = {}

    def note(rank: int, op: Op, group: int, seq: int, peer: int, size: int, shape: int = 0) -> Event:
        now = clock[rank]
        event = Event(op, group, seq, peer, size, step[rank], phase[rank], now, now, None, shape)
        events[rank].append(event)
        return event

    def advance(rank: int) -> bool:
        if at[rank] >= len(programs[rank]) or rank in waiting:
            return False
        action = programs[rank][at[rank]]
        if action[0] == "stop":
            return False
        if action[0] == "mark":
            step[rank], phase[rank] = action[1], action[2]
            note(rank, Op.MARK, 0, 0, -1, 0).end = clock[rank]
        elif action[0] == "compute":
            clock[rank] += action[1]
        elif action[0] == "send":
            seq = counts[rank, ("send", action[1])]
            counts[rank, ("send", action[1])] += 1
            event = note(rank, Op.SEND, group_id(everyone), seq, action[1], action[2], 1)
            clock[rank] += 0.01 * MS
            event.end = clock[rank]
            way = wire((rank, action[1]), action[2], step[rank])
            if way is not None:
                mail[rank, action[1], seq] = event.call + way
        elif action[0] == "recv":
            seq = counts[rank, ("recv", action[1])]
            if rank not in receiving:
                receiving[rank] = note(rank, Op.RECV, group_id(everyone), seq, action[1], action[2], 1)
            if (action[1], rank, seq) not in mail:
                return False
            event = receiving.pop(rank)
            counts[rank, ("recv", action[1])] += 1
            clock[rank] = max(clock[rank] + 0.01 * MS, mail[action[1], rank, seq])
            event.end = clock[rank]
        else:
            ranks = tuple(action[1])
            gid = group_id(ranks)
            groups.setdefault(gid, Group(gid, f"group{ranks}", ranks))
            seq = counts[rank, gid]
            counts[rank, gid] += 1
            op = action[3] if len(action) > 3 else Op.ALLREDUCE
            event = note(rank, op, gid, seq, -1, action[2], action[2] | 1)
            arrived[gid, seq][rank] = event
            waiting[rank] = (ranks, event)
            way = wire(ranks, action[2], step[rank])
            if len(arrived[gid, seq]) == len(ranks) and way is not None:
                end = max(e.call for e in arrived[gid, seq].values()) + way
                for member, e in arrived[gid, seq].items():
                    e.end = end + dice.uniform(0, 0.02 * MS)
                    clock[member] = e.end
                    del waiting[member]
        at[rank] += 1
        return True

    while any(advance(rank) for rank in range(world)):
        pass
    skew = {rank: dice.uniform(-skew_s, skew_s) for rank in range(world)}
    stuck = any(at[r] < len(programs[r]) or r in waiting for r in range(world))
    return Drawing(world, events, groups, skew, max(clock), max(clock) + (after_s if stuck else 0), lost, seed)


def training(
    layout: Layout,
    *,
    steps: int,
    schedule: str = "1f1b",
    microbatches: int = 4,
    work: Callable[[int], float] = lambda stage: 5 * MS,
    slow: Callable[[int, int], float] = lambda rank, step: 1.0,
    jitter: float = 0.03,
    seed: int = 0,
    before: Callable[[int, int], list[Action]] = lambda rank, step: [],
) -> list[list[Action]]:
    """The programs of a layout. `work(virtual stage)` seconds a forward, `slow(rank, step)` a factor on all of a rank's work,
    `before(rank, step)` more actions at a step's start."""
    dice = random.Random(seed)
    programs: list[list[Action]] = []
    everyone = tuple(range(layout.world))
    for rank in range(layout.world):
        pp, dp, tp = layout.seat(rank)
        out: list[Action] = []
        mine = tuple(layout.rank(pp, dp, t) for t in range(layout.tp))
        replicas = tuple(layout.rank(pp, d, tp) for d in range(layout.dp))
        for step in range(steps):
            out += [("mark", step, Phase.TRAIN), *before(rank, step)]
            for kind, stage in _order(schedule, layout.pp, pp, microbatches):
                seconds = work(stage) * (1 if kind == "F" else 2) * slow(rank, step) * dice.lognormvariate(0, jitter)
                last = layout.pp * (2 if schedule == "interleaved" else 1) - 1
                source, target = (stage - 1, stage + 1) if kind == "F" else (stage + 1, stage - 1)
                if 0 <= source <= last and source % layout.pp != pp:
                    out.append(("recv", layout.rank(source % layout.pp, dp, tp), 65536))
                if layout.tp > 1:
                    out += [
                        ("compute", seconds / 2),
                        ("meet", mine, 4096),
                        ("compute", seconds / 2),
                        ("meet", mine, 4096),
                    ]
                else:
                    out.append(("compute", seconds))
                if 0 <= target <= last and target % layout.pp != pp:
                    out.append(("send", layout.rank(target % layout.pp, dp, tp), 65536))
            if layout.dp > 1:
                out.append(("meet", replicas, 1 << 20))
            out.append(("meet", everyone, 8))
            out.append(("compute", 1 * MS * slow(rank, step)))
        out.append(("mark", steps, Phase.TRAIN))
        programs.append(out)
    return programs


def _order(schedule: str, pp: int, p: int, microbatches: int) -> list[tuple[str, int]]:
    """(F or B, virtual stage) in the order in which a pp rank does them."""
    if schedule == "1f1b":
        warm = min(pp - p - 1, microbatches)
        order = ["F"] * warm
        for _ in range(microbatches - warm):
            order += ["F", "B"]
        order += ["B"] * warm
        return [(kind, p) for kind in order]
    total, chunks = 2 * microbatches, 2  # interleaved: chunk c of rank p is virtual stage c * pp + p
    warm = min(total, (pp - p - 1) * 2 + (chunks - 1) * pp)

    def forward(k: int) -> tuple[str, int]:
        return "F", (k % (pp * chunks)) // pp * pp + p

    def backward(k: int) -> tuple[str, int]:
        return "B", (chunks - 1 - (k % (pp * chunks)) // pp) * pp + p

    out = [forward(k) for k in range(warm)]
    for k in range(total - warm):
        out += [forward(warm + k), backward(k)]
    return out + [backward(k) for k in range(total - warm, total)]
