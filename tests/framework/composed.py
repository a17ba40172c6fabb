"""Composed configs, each once in a session: composing takes Hydra an eighth of a second."""

from __future__ import annotations

import copy
import functools
from typing import Any

from launch.compose import compose


def composed(*words: str, **values: Any) -> dict[str, Any]:
    """The plain values of `train.yaml` under some words, with some top-level values put in afterwards."""
    return copy.deepcopy(_once(words)) | values


@functools.cache
def _once(words: tuple[str, ...]) -> dict[str, Any]:
    return compose(list(words))
