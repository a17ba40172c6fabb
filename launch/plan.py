"""holdfast plan: print everything that would be decided, and start nothing.

    holdfast plan [key=value ...]          the same arguments as `holdfast train`

Rule of this file: compose, decode, print.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.compose import run_composed
from launch.train import config_of, help_text


def main(arguments: Sequence[str]) -> int:
    """Print the plan. Raises ValueError, as `train` would, for what can be known to be wrong before a start."""
    if "-h" in arguments or "--help" in arguments:
        print((__doc__ or "") + help_text())
        return 0
    return run_composed("plan", arguments, _job)


def _job(values: dict[str, Any]) -> int:
    config = config_of(values)
    from framework.driver import plan

    print(plan(config))
    return 0
