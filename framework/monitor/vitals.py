"""Vitals: what machines and processes are like while they train: memory, load, processor, network.

    every few seconds: agents --vitals--> sys/<node>/*      workers --vitals--> mem/*      for the sinks, never for decisions

A question that is under way is never repeated, and what does not answer is left out, so asking costs a pending call at most.

Rule of this file: it asks and names. It waits for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.cluster.cluster import Call, CallError, Remote

PERIOD_S = 15.0


class Vitals:
    """The newest numbers under their full names."""

    def __init__(self) -> None:
        self._due = 0.0
        self._calls: dict[str, Call] = {}

    def poll(self, now: float, agents: Mapping[str, Remote], workers: Mapping[str, Remote]) -> dict[str, float]:
        """The answers that have come since the last time; asks again when it is time. Returns at once."""
        if now >= self._due and not self._calls:
            self._due = now + PERIOD_S
            self._calls = {f"sys/{node}": agent.call("vitals") for node, agent in agents.items()}
            self._calls |= {f"mem/{name}": worker.call("vitals") for name, worker in workers.items()}
            return {}
        if not self._calls or (now < self._due and not all(call.done() for call in self._calls.values())):
            return {}
        answers = {name: answer for name, call in self._calls.items() if (answer := _answer(call))}
        self._calls = {}
        return numbers(answers)


def numbers(answers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Nodes' numbers each under its node; workers' as the largest and the sum over all, under `mem/`."""
    found = {f"{who}/{key}": value for who, facts in answers.items() if who.startswith("sys/") for key, value in facts.items()}
    of_workers: dict[str, list[float]] = {}
    for who, facts in answers.items():
        if who.startswith("mem/"):
            for key, value in facts.items():
                of_workers.setdefault(key, []).append(value)
    for key, values in of_workers.items():
        found |= {f"mem/{key}_max": max(values), f"mem/{key}_sum": sum(values)}
    return found


def _answer(call: Call) -> dict[str, Any]:
    try:
        return dict(call.result(0)) if call.done() else {}
    except (CallError, TimeoutError):
        return {}
