"""holdfast cluster: look at the emulated machines of a run that is going on, take one away, bring one back.

    holdfast cluster RUN                      its machines, and whether they are up, stopped or dead
    holdfast cluster RUN add [NODE]           a dead machine comes back, empty; or a new one joins
    holdfast cluster RUN drain NODE [SECONDS] notice through Ray; the machine is gone when the time (60 s) is over
    holdfast cluster RUN kill NODE            power cut: SIGKILL for all that runs there
    holdfast cluster RUN stop NODE            freeze it (SIGSTOP)
    holdfast cluster RUN cont NODE            let it go on

RUN is a run directory. On a cluster of real machines use ray start, ray stop and ray drain-node: the run notices those too.

Rule of this file: arguments in, lines and an exit code out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from framework.cluster.nodes import ClusterError, natural
from framework.cluster.reach import Reach, reach_of

VERBS = {"add": (0, 1), "drain": (1, 2), "kill": (1, 1), "stop": (1, 1), "cont": (1, 1)}  # least and most words after it
NOTICE_S = 60.0


def main(arguments: Sequence[str]) -> int:
    """Look or act. Raises ValueError for what the user can mend."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    if not arguments:
        raise ValueError("holdfast cluster: must be given a run directory, got nothing; for example holdfast cluster runs/NAME")
    directory, *words = arguments
    if words and words[0] not in VERBS:
        raise ValueError(f"holdfast cluster: must be followed by one of {', '.join(VERBS)}, got {words[0]!r}")
    if not Path(directory).is_dir():
        raise ValueError(f"{directory}: must be a run directory, got none; see runs/")
    reach = reach_of(directory)
    try:
        print(_act(reach, words[0], words[1:]) if words else _list(reach))
    except ClusterError as error:
        raise ValueError(str(error)) from error
    return 0


def _list(reach: Reach) -> str:
    names = {name: state for name, state in reach.machines.names().items() if name != "head"}
    return "\n".join(f"{name:<6}{names[name]}" for name in sorted(names, key=natural))


def _act(reach: Reach, verb: str, words: Sequence[str]) -> str:
    least, most = VERBS[verb]
    if not least <= len(words) <= most:
        wanted = "a node" if least else "at most a node"
        raise ValueError(f"holdfast cluster RUN {verb}: must be given {wanted}, got {' '.join(words) or 'nothing'}; for example n1")
    machines = reach.machines
    if verb == "add":
        node = words[0] if words else _new_name(machines.names())
        machines.add(node)
        return f"{node} is up"
    node = words[0]
    if verb == "drain":
        seconds = _seconds(words[1]) if len(words) > 1 else NOTICE_S
        reach.drain(node, deadline_s=seconds)
        return f"{node} has notice, and is gone in {seconds:g} s"
    pids = {"kill": machines.kill, "stop": machines.stop, "cont": machines.cont}[verb](node)
    return f"{node}: {verb}, {len(pids)} processes"


def _new_name(known: dict[str, str]) -> str:
    """A dead machine, else a name that no machine has had."""
    dead = sorted((name for name, state in known.items() if state == "dead"), key=natural)
    return dead[0] if dead else next(f"n{i}" for i in range(len(known) + 1) if f"n{i}" not in known)


def _seconds(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"holdfast cluster RUN drain: must be given seconds, got {word!r}; for example 30") from None
