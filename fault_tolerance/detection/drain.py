"""Drain: log lines to templates, in a tree of fixed depth, while they come in.

    "worker 3: connection to 10.0.0.7:4711 lost"   masked    "worker <num>: connection to <addr> lost"
     root -> 6 tokens -> "worker" -> [ templates ]           joined if 40% of the tokens are equal; others become <*>

Parsers that learn are no better at grouping and a hundred times slower. Tracebacks are joined into one message before
they get here.

Rule of this file: pure text. Source: Drain (He et al., ICWS 2017), written from its description.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SIMILAR = 0.4
MAX_CHILDREN = 100
WILD = "<*>"

_MASKS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\x1b\[[0-9;]*m", ""),
        (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?", "<time>"),
        (r"\b\d\d:\d\d:\d\d(?:[.,]\d+)?", "<time>"),
        (r"\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b", "<addr>"),
        (r"\[(?:\s*-?\d+(?:\.\d+)?\s*,?)+\]|\((?:\s*-?\d+\s*,)+\s*-?\d*\s*\)", "<list>"),
        (r"(?<![\w/])(?:/[\w.@+-]+){2,}/?", "<path>"),
        (r"\b0x[0-9a-fA-F]+\b|\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{8,}\b", "<hex>"),
        (r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?=%|[a-zA-Z]{0,3}\b)", "<num>"),
    )
)


def mask(line: str) -> str:
    """The line without what differs each time: times, addresses, paths, numbers, lists of numbers."""
    for pattern, name in _MASKS:
        line = pattern.sub(name, line)
    return line.rstrip("\r")


def join_tracebacks(lines: Iterable[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """(time, message) from (time, line): a Python traceback becomes `<exception> at <last frame>`, at the time of its last
    line, and what a carriage return overwrote is gone."""
    frame, inside = "", False
    for at, raw in lines:
        line = raw.rstrip("\r\n").rsplit("\r", 1)[-1]
        if line.lstrip().startswith("Traceback (most recent call last)"):
            inside, frame = True, ""
        elif inside and line.startswith((" ", "\t")):
            if line.lstrip().startswith("File "):
                frame = line.strip()
        elif inside and line.strip():
            inside = False
            yield at, f"{line} at {frame}" if frame else line
        elif line.strip():
            yield at, line


@dataclass(slots=True)
class Template:
    """A kind of message. `tokens` with `<*>` where its lines differ."""

    id: int
    tokens: list[str]
    count: int = 0

    @property
    def text(self) -> str:
        """The template as a line."""
        return " ".join(self.tokens)


@dataclass(slots=True)
class Tree:
    """All templates seen so far; keep it between jobs so that their ids stay the same."""

    templates: list[Template] = field(default_factory=list)
    _leaves: dict[tuple[int, str], list[Template]] = field(default_factory=dict)
    _first: dict[int, set[str]] = field(default_factory=dict)

    def add(self, message: str) -> Template:
        """The template of a message, made if there is none like it."""
        tokens = mask(message).split()
        leaf = self._leaves.setdefault(self._place(tokens), [])
        best = max(leaf, key=lambda t: _similarity(t.tokens, tokens), default=None)
        if best is None or _similarity(best.tokens, tokens)[0] < SIMILAR:
            best = Template(len(self.templates), tokens)
            self.templates.append(best)
            leaf.append(best)
        else:
            best.tokens = [a if a == b else WILD for a, b in zip(best.tokens, tokens, strict=True)]
        best.count += 1
        return best

    def _place(self, tokens: list[str]) -> tuple[int, str]:
        first = tokens[0] if tokens else ""
        known = self._first.setdefault(len(tokens), set())
        if any(c.isdigit() for c in first) or (first not in known and len(known) >= MAX_CHILDREN):
            return len(tokens), WILD
        known.add(first)
        return len(tokens), first


def _similarity(template: list[str], tokens: list[str]) -> tuple[float, int]:
    if not tokens:
        return 1.0, 0
    equal = sum(a == b for a, b in zip(template, tokens, strict=True))
    return equal / len(tokens), -template.count(WILD)
