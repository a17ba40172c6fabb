"""Out of thousands of lines, the one that says what happened."""

from __future__ import annotations

import random
import time

import pytest

from fault_tolerance.detection.drain import Tree, join_tracebacks, mask
from fault_tolerance.detection.log_cause import Background, Line, likely_causes, messages


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("2026-01-02 03:04:05,678 rank 3: loss 2.31", "<time> rank <num>: loss <num>"),
        ("connect to 10.0.0.7:4711 failed", "connect to <addr> failed"),
        ("cannot open /data/a/part-0001.bin", "cannot open <path>"),
        ("bad pointer 0x7ffde3 in block deadbeef01", "bad pointer <hex> in block <hex>"),
        ("shape [2, 3, 4] expected (2, 3)", "shape <list> expected <list>"),
        ("took 12.5ms at 80%", "took <num>ms at <num>%"),
    ],
)
def test_what_varies_is_masked(line, masked):
    assert mask(line) == masked


def test_lines_of_one_kind_share_a_template():
    tree = Tree()
    kinds = ("worker {} joined from host h{}", "step {} took {} s", "lost connection to {} after {} tries")
    for i in range(300):
        tree.add(kinds[i % 3].format(i, i * 7))
    assert [t.count for t in tree.templates] == [100, 100, 100]


def test_words_that_differ_become_wild():
    tree = Tree()
    for name in ("alice", "bob", "carol"):
        tree.add(f"user {name} logged in from the console")
    assert [t.text for t in tree.templates] == ["user <*> logged in from the console"]


def test_a_traceback_is_one_message():
    text = [
        "step 7",
        "Traceback (most recent call last):",
        '  File "train.py", line 10, in <module>',
        "    main()",
        '  File "data.py", line 4, in read',
        "    raise OSError(5)",
        "OSError: [Errno 5] Input/output error",
        "progress 1%\rprogress 2%",
    ]
    assert [m for _, m in join_tracebacks(enumerate(text))] == [
        "step 7",
        'OSError: [Errno 5] Input/output error at File "data.py", line 4, in read',
        "progress 2%",
    ]


def healthy(dice: random.Random, ranks: int, seconds: float) -> list[Line]:
    kinds = ("step {} loss {}", "saved snapshot {} in {} ms", "worker heartbeat {} {}", "slow disk warning {} {}")
    return [
        Line(rank, dice.uniform(0, seconds), dice.choice(kinds).format(dice.randrange(9999), dice.random()))
        for rank in range(ranks)
        for _ in range(20)
    ]


@pytest.mark.slow
def test_the_first_cause_is_named_among_its_effects():
    right = 0
    for seed in range(20):
        dice = random.Random(seed)
        background = Background()
        background.learn(healthy(dice, 64, 600), rank_seconds=64 * 600)
        culprit, at = dice.randrange(64), 550.0
        lines = healthy(dice, 64, 600)
        lines.append(Line(culprit, at, f"kernel: NVRM: Xid 79 on device {dice.randrange(8)}: fell off the bus"))
        for rank in range(64):
            if rank != culprit:
                late = at + dice.uniform(5, 60)
                lines.append(Line(rank, late, f"collective {dice.randrange(999)} timed out after {dice.random()} s"))
                lines.append(Line(rank, late + 1, "RuntimeError: Connection closed by peer [10.0.0.3]:4242"))
        causes = likely_causes(lines, background, num_ranks=64, window_s=600)
        right += causes[0].line.rank == culprit and "Xid 79" in str(causes[0])
    assert right >= 19


def test_a_healthy_log_has_no_cause():
    dice = random.Random(0)
    background = Background()
    background.learn(healthy(dice, 8, 600), rank_seconds=8 * 600)
    assert likely_causes(healthy(dice, 8, 600), background, num_ranks=8, window_s=600) == []


def test_a_rank_s_traceback_is_its_cause():
    lines = messages(
        3, [(1.0, "Traceback (most recent call last):"), (1.0, '  File "a.py", line 1'), (1.1, "KeyError: 'x'")]
    )
    lines += [Line(r, 2.0, "Connection closed by peer") for r in range(8)]
    (first, *_) = likely_causes(lines, Background(), num_ranks=8, window_s=10)
    assert first.ranks == (3,) and "KeyError" in str(first)


def test_twenty_thousand_lines_a_second():
    dice = random.Random(1)
    lines = [line.text for line in healthy(dice, 500, 600)]
    tree, start = Tree(), time.process_time()
    for line in lines:
        tree.add(line)
    assert len(lines) / (time.process_time() - start) > 20_000
