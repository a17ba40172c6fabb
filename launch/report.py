"""holdfast report: draw what a run did, as one HTML file.

    holdfast report RUN_DIR          writes RUN_DIR/report.html and prints its path; also while the run goes on

Rule of this file: arguments in, a path out.
"""

from __future__ import annotations

from collections.abc import Sequence

from framework.monitor.report import write


def main(arguments: Sequence[str]) -> int:
    """Write the report. Raises ValueError if there is no run in the directory."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    if len(arguments) != 1:
        got = " ".join(arguments) or "nothing"
        raise ValueError(
            f"holdfast report: must be given one run directory, got {got}; for example holdfast report runs/NAME"
        )
    print(write(arguments[0]))
    return 0
