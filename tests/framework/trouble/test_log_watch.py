"""Logs are followed while ranks run, and the line that stands out before a trouble is named, never its effects."""

from __future__ import annotations

import time
from pathlib import Path

from framework.plan import Plan, Seat, Source
from framework.trouble.log_watch import LogWatch, log_name
from parallel.layout import Layout

PLAN = Plan(
    run="r",
    generation=3,
    layout=Layout(1, 4, 1),
    schedule="1f1b",
    num_microbatches=1,
    seats=tuple(Seat(f"n{i}", 0) for i in range(4)),
    domains={},
    tolerate=1,
    source=Source("fresh", 0),
    options=(),
    reason="",
)
BROKEN = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4711\n"


def write(home: Path, rank: int, text: str) -> None:
    with (home / log_name(3, rank, f"n{rank}.0")).open("a") as file:
        file.write(text)


def test_the_line_of_one_rank_is_named_and_what_all_say_of_it_is_not(tmp_path: Path) -> None:
    watch = LogWatch(str(tmp_path), PLAN)
    for rank in range(4):
        write(tmp_path, rank, f"step 1 of rank {rank} took 0.{rank} s\n")
    watch.poll(time.time())
    write(tmp_path, 2, "dataset: shard 17 of corpus-b is truncated at byte 4096\n")
    for rank in (0, 1, 3):
        write(tmp_path, rank, BROKEN)
    assert watch.likely(time.time()).startswith("rank 2: dataset: shard 17")


def test_a_process_that_was_killed_left_no_line_and_none_is_made_up(tmp_path: Path) -> None:
    watch = LogWatch(str(tmp_path), PLAN)
    for rank in (0, 1, 3):
        write(tmp_path, rank, BROKEN)
    assert watch.likely(time.time()) == ""


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    watch = LogWatch(str(tmp_path), PLAN)
    write(tmp_path, 1, "out of mem")
    watch.poll(time.time())
    write(tmp_path, 1, "ory: killed\n")
    assert watch.likely(time.time()) == "rank 1: out of memory: killed"


def test_a_line_written_every_minute_is_no_news(tmp_path: Path) -> None:
    watch, now = LogWatch(str(tmp_path), PLAN), time.time()
    for minute in range(5):
        write(tmp_path, 0, f"saved checkpoint {minute}\n")
        watch.poll(now + 61 * minute)
    write(tmp_path, 0, "saved checkpoint 5\n")
    assert watch.likely(time.time()) == ""
