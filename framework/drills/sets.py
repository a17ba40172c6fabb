"""Drill sets: the drills that have a name, as values.

Faults fire inside the run, at a step and phase (`faults.py`); strikes come from outside, at a moment that only the drill knows
(`strikes.py`). Most drills differ from their twin by these alone, so that one twin serves them all.

Rule of this file: data. What must hold afterwards is in `drill.py`.
"""

from __future__ import annotations

import random

from framework.drills.drill import Drill
from framework.drills.strikes import Strike, drawn

BASE = (
    "model=tiny",
    "data=synthetic",
    "optim.num_steps=12",
    "optim.global_batch=8",
    "monitor=quiet",
    "cluster.num_nodes=4",
    "cluster.workers_per_node=2",
    "layout.pp=2",
    "layout.dp=2",
    "layout.tp=2",
    "fault_tolerance.tolerate=2",
    "fault_tolerance.every_steps=2",
    "fault_tolerance.max_steps_lost=2",
)
FEW = (  # one worker a node: steps are short, so that machines have time to come back
    "model=tiny",
    "data=synthetic",
    "optim.global_batch=8",
    "monitor=quiet",
    "cluster.num_nodes=4",
    "cluster.workers_per_node=1",
    "layout.pp=2",
    "layout.dp=2",
    "layout.tp=1",
    "fault_tolerance.tolerate=2",
    "fault_tolerance.every_steps=2",
    "fault_tolerance.max_steps_lost=2",
)
LONG = (*FEW, "optim.num_steps=120", "detect.quarantine_s=10")
MATRIX = (  # nodes come back again and again and are not barred for it
    "model=tiny",
    "data=synthetic",
    "data.seq_len=16",
    "optim.global_batch=8",
    "monitor=quiet",
    "cluster.num_nodes=4",
    "fault_tolerance.tolerate=2",
    "fault_tolerance.every_steps=2",
    "fault_tolerance.max_steps_lost=2",
    "detect.quarantine_s=0.01",
)
FOUR = (*BASE[:5], "layout.pp=1", "layout.dp=4", "layout.tp=1", "fault_tolerance.tolerate=1", *BASE[-2:])
PAIRS = (*FOUR, "cluster.num_nodes=2", "cluster.workers_per_node=2")

EVERY_PHASE = (
    (2, "forward", 1),
    (4, "backward", 6),
    (6, "optimizer", 3),
    (8, "staging", 4),
    (10, "encode", 0),
    (12, "transfer", 7),
    (10, "recovery", 2),
)
LAYOUTS = ((2, 2, 2), (1, 4, 2), (2, 4, 1), (4, 2, 1))


def _fault(step: int, kind: str, phase: str, **where: object) -> str:
    [(key, value)] = where.items()
    return f"{{step: {step}, kind: {kind}, phase: {phase}, {key}: {value}}}"


DRILLS = (
    Drill("worker", "a worker is killed and replaced in place", BASE, (_fault(7, "kill_worker", "forward", rank=3),)),
    Drill("node", "a node is lost; the rest goes on under another layout", BASE, (_fault(7, "kill_node", "backward", node="n1"),)),
    Drill("first", "the node of rank 0 is lost", BASE, (_fault(7, "kill_node", "forward", node="n0"),)),
    Drill(
        "pair",
        "two nodes are lost at once",
        BASE,
        (_fault(7, "kill_node", "forward", node="n1"), _fault(7, "kill_node", "forward", node="n2")),
    ),
    Drill(
        "again",
        "a second node is lost while the first loss is being recovered from: while state is restored",
        BASE,
        (_fault(7, "kill_node", "forward", node="n1"), _fault(6, "kill_node", "recovery", node="n3")),
    ),
    Drill(
        "sooner",
        "the same, before the crew is called together",
        BASE,
        strikes=(Strike("step 7", 0.0, "kill_node", "n1"), Strike("trouble 1", 0.0, "kill_node", "n0")),
    ),
    Drill(
        "later",
        "the same, before the first new snapshot is protected",
        BASE,
        strikes=(Strike("step 7", 0.2, "kill_node", "n2"), Strike("crew 2", 0.8, "kill_node", "n3")),
    ),
    Drill(
        "spare",
        "a lost node is replaced by a spare, under the same layout",
        (*BASE, "cluster.spare_nodes=1"),
        (_fault(7, "kill_node", "optimizer", node="n2"),),
        kinds=("node_loss",),
    ),
    Drill(
        "grow",
        "a lost node comes back and is grown onto, then another one is lost",
        LONG,
        (
            "{step: 6, kind: kill_node, node: n1, phase: backward}",
            "{step: 8, kind: add_node, node: n1}",
            "{step: 110, kind: kill_node, node: n2, phase: forward}",
        ),
        kinds=("node_loss", "resize", "node_loss"),
        news=("gone", "joined", "gone"),
    ),
    Drill(
        "flap",
        "a node that comes and goes is barred, and used again when that is over",
        LONG,
        tuple(
            f"{{step: {step}, kind: {kind}, node: n1}}"
            for step, kind in ((6, "kill_node"), (8, "add_node"), (30, "kill_node"), (32, "add_node"), (54, "kill_node"), (56, "add_node"))
        ),
        kinds=("node_loss",),
        news=("gone", "joined", "gone", "joined", "gone", "quarantine", "expired"),
    ),
    Drill(
        "preempt",
        "a node is asked to leave (SIGTERM) and taken away; the state is safe before it goes",
        LONG,
        ("{step: 7, kind: preempt, node: n1, phase: forward, severity: 15}",),
        kinds=("preemption",),
        news=("left",),
    ),
    Drill(
        "partition",
        "a node is out of reach for a while; what was there is fenced, and the node is used again",
        LONG,
        ("{step: 7, kind: partition, node: n1, phase: backward, severity: 12}",),
        kinds=("node_loss", "resize"),
        news=("gone", "joined"),
    ),
    Drill(
        "corrupt",
        "a block in memory is damaged and a node is lost; both are decoded",
        (*FEW, "optim.num_steps=16", "fault_tolerance.scrub_mb_s=0"),
        ("{step: 7, kind: corrupt_block, node: n2, severity: 1}", "{step: 8, kind: kill_node, node: n1, phase: forward}"),
        kinds=("node_loss",),
        tier="parity",
    ),
    Drill(
        "fallback",
        "more is damaged and lost than parity can mend; the run goes on from its checkpoint",
        (
            *FEW,
            "optim.num_steps=20",
            "optim.global_batch=32",  # steps that are long enough for a checkpoint to be written between the first and the loss
            "fault_tolerance.scrub_mb_s=0",
            "fault_tolerance.tolerate=1",
            "fault_tolerance.durable.every_steps=4",
        ),
        ("{step: 11, kind: corrupt_block, node: n2, severity: 99}", "{step: 12, kind: kill_node, node: n1, phase: forward}"),
        kinds=("node_loss",),
        lost=4,
        tier="durable",
    ),
    Drill("vault", "a node's agent is killed, and with it the vault", BASE, strikes=(Strike("step 6", 0.1, "kill_agent", "n2"),)),
    Drill(
        "vaults",
        "all agents are killed at once, and with them all vaults; the ranks go on from what they have themselves",
        BASE,
        strikes=tuple(Strike("step 6", 0.0, "kill_agent", f"n{node}") for node in range(4)),
    ),
    Drill(
        "unseen",
        "a worker is killed, and the controller with it: nobody is there to throw the others out of their collectives",
        BASE,
        strikes=(Strike("step 6", 0.0, "kill_controller"), Strike("step 6", 0.0, "kill_worker", "n0.0")),
    ),
    Drill("stop", "a worker is stopped (SIGSTOP)", BASE, ("{step: 7, kind: stop_worker, rank: 5, phase: forward}",), verdict=("hang", 5)),
    Drill(
        "hang",
        "a worker never comes to a collective",
        PAIRS,
        ("{step: 9, kind: hang, rank: 2, severity: 0}",),
        verdict=("hang", 2),
    ),
    Drill("gil", "a worker holds its interpreter lock for ever", PAIRS, ("{step: 9, kind: hang, rank: 1, severity: 1}",), verdict=("hang", 1)),
    Drill(
        "straggler",
        "a worker gets a quarter of its time; it is named, and acted upon only if that pays",
        (*PAIRS, "optim.num_steps=60"),
        ("{step: 20, kind: slow_worker, rank: 2, severity: 4}",),
        verdict=("slow_compute", 2),
    ),
    Drill(
        "swap",
        "a slow machine is replaced by a spare, because the run is long enough for that to pay",
        (*FOUR, "cluster.num_nodes=4", "cluster.spare_nodes=1", "cluster.max_nodes=5", "optim.num_steps=300"),
        ("{step: 20, kind: slow_worker, rank: 2, severity: 5}",),
        verdict=("slow_compute", 2),
    ),
    Drill("poison", "a loss is no number, once", PAIRS, ("{step: 9, kind: poison, rank: 1}",), verdict=("nan", 1)),
    Drill(
        "flip",
        "one bit of one rank's parameters flips",
        (*PAIRS, "detect.digest_every=1"),
        ("{step: 8, kind: flip_bit, rank: 2}",),
        verdict=("corrupt", 2),
    ),
    Drill(
        "watch",
        "a node is lost and grown onto again, the controller is killed, and whoever hangs then is still named",
        (*LONG, "detect.hang_timeout_s=8"),
        (
            "{step: 6, kind: kill_node, node: n1, phase: backward}",
            "{step: 8, kind: add_node, node: n1}",
            "{step: 100, kind: hang, rank: 2, severity: 0}",
        ),
        strikes=(Strike("resized 2", 1.0, "kill_controller"),),
        kinds=("node_loss", "resize", "controller", "hang"),
        verdict=("hang", 2),
    ),
    Drill(
        "balance",
        "a worker needs three times as long for everything; its replica takes fewer samples",
        (*FEW, "data.seq_len=256", "optim.global_batch=32", "optim.num_steps=70", "cluster.min_nodes=4"),
        ("{step: 16, kind: slow_worker, rank: 1, severity: 3}",),
        shares=True,
    ),
    Drill("raise", "a worker raises an error", BASE, (_fault(7, "raise", "optimizer", rank=2),)),
    Drill(
        "phases",
        "workers are killed in every phase of a step, one after the other",
        BASE,
        tuple(_fault(step, "kill_worker", phase, rank=rank) for step, phase, rank in EVERY_PHASE),
    ),
    Drill(
        "controller",
        "the controller is killed while it musters, watches, clears up after a lost node, and closes the run out",
        (*BASE, "optim.num_steps=40"),  # the crew steps on while the controller is away
        strikes=(
            Strike("plan 1", 0.2, "kill_controller"),
            Strike("crew 1", 1.0, "kill_controller"),
            Strike("crew 2", 1.0, "kill_node", "n1"),
            Strike("trouble 3", 0.0, "kill_controller"),
            Strike("evaluation 1", 0.1, "kill_controller"),
        ),
    ),
    Drill(
        "fence",
        "a node is stopped, replaced, and wakes up again",
        BASE,
        strikes=(Strike("step 6", 0.1, "stop_node", "n1"), Strike("resized 1", 0.3, "wake_node", "n1")),
    ),
    Drill("interrupt", "Ctrl-C, then resumed", BASE, strikes=(Strike("step 5", 0.2, "interrupt"),), exit_code=130),
    Drill(
        "terminate",
        "SIGTERM in the middle of a recovery, then resumed",
        BASE,
        strikes=(Strike("step 5", 0.1, "kill_worker", "n1.1"), Strike("trouble 1", 0.1, "terminate")),
        exit_code=130,
    ),
    Drill(
        "storage",
        "more nodes are lost than parity covers; it goes on from the durable checkpoint",
        (*BASE, "fault_tolerance.durable.every_steps=4"),
        strikes=(Strike("checkpoint 1", 0.2, "kill_node", "n1"), *(Strike("checkpoint 1", 0.0, "kill_node", n) for n in ("n2", "n3"))),
    ),
    Drill(
        "beyond",
        "more nodes are lost than parity covers, and there is no checkpoint: the last word says so",
        BASE,
        strikes=tuple(Strike("step 6", 0.0, "kill_node", node) for node in ("n1", "n2", "n3")),
        exit_code=3,
        says=("state lost: step", "no checkpoint exists"),
    ),
    Drill(
        "lemon",
        "a machine on which the same step fails twice is left out; the run goes on without it",
        BASE,
        tuple(_fault(6, "raise", "forward", node="n1") for _ in range(2)),
        kinds=("crash", "crash"),
        news=("quarantine",),
    ),
    Drill(
        "stuck",
        "the same step fails three times: it ends, and what was reached is saved",
        BASE,
        tuple(_fault(6, "raise", "forward", rank=2) for _ in range(3)),
        exit_code=4,
        says=("step 6 failed 3 times in a row", "a checkpoint of step 4 exists: go on with resume="),
    ),
)


def random_drill(seed: int, *, num_steps: int = 40) -> Drill:
    """A drill drawn by a seed: one of four layouts, machines and processes killed at random moments, from outside."""
    pp, dp, tp = random.Random(seed).choice(LAYOUTS)
    overrides = (*BASE, f"layout.pp={pp}", f"layout.dp={dp}", f"layout.tp={tp}", f"optim.num_steps={num_steps}")
    strikes = drawn(seed, num_steps=num_steps, nodes=4, slots=2, tolerate=2)
    return Drill(f"random-{seed}", f"{pp}x{dp}x{tp}; {'; '.join(map(str, strikes))}", overrides, strikes=strikes, loose=True)
