"""The command line: `holdfast <command> [arguments]`, each command a file of this folder.

    launch/train.py   ->   holdfast train        its `main(arguments) -> exit code`; its docstring's first line is its help

A command is imported when it is called, so that `holdfast --help` does not wait for PyTorch. Exit codes: 0 finished,
1 a bug or a failed check, 2 user error (one line, no traceback), 3 unrecoverable, 4 no progress, 130 interrupted.

Rule of this file: it knows names of commands, and nothing of what they do.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

COMMANDS = ("train", "plan", "drill", "cluster", "checkpoint", "report", "doctor", "simulate")
USER_ERROR, INTERRUPTED = 2, 130
HERE = Path(__file__).resolve().parent

USAGE = """\
Holdfast trains language models on clusters that lose machines.

usage: holdfast <command> [arguments]
       holdfast <command> --help
       holdfast --version

commands:
{commands}
examples:
  holdfast train                                      the default: a small model on Python's own source text
  holdfast train model=20m layout=auto cluster.num_nodes=8
  holdfast train optim.lr=1e-3,3e-3 --multirun        one run for each value
  holdfast plan model=7b layout.pp=4 layout.dp=4      what would be decided; starts nothing
  holdfast report runs/2026-01-31_10-00-00_a1b2

exit codes: 0 finished, 2 user error, 3 unrecoverable, 4 no progress, 130 interrupted
HOLDFAST_TRACEBACK=1 shows the traceback of a user error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code. Whoever calls it in a process of theirs keeps their handler of SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _own_packages_first()
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, also while libraries are loaded
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except ValueError as error:
        if not _deliberate(error):
            raise
        if os.environ.get("HOLDFAST_TRACEBACK") == "1":
            traceback.print_exc()
        return _say(str(error), USER_ERROR)
    except SystemExit as end:  # argparse, here or in Hydra
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # `holdfast plan | head`: whoever read us has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def commands() -> dict[str, Path]:
    """The commands that exist, in the order of their use."""
    return {name: HERE / f"{name}.py" for name in COMMANDS if (HERE / f"{name}.py").exists()}


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands=_summaries()))
        return 0 if words else USER_ERROR
    if words[0] in ("-V", "--version"):
        from framework.cluster.checkout import ROOT, version

        print(f"holdfast {version()} ({ROOT})")
        return 0
    if words[0] not in commands():
        raise ValueError(f"holdfast {words[0]}: no such command; {_nearest(words[0])}")
    command = importlib.import_module(f"launch.{words[0]}")
    return int(command.main(words[1:]))


def _nearest(word: str) -> str:
    near = difflib.get_close_matches(word, commands(), n=1, cutoff=0.5)
    if near:
        return f"did you mean holdfast {near[0]}?"
    return f"there are {', '.join(commands())}"


def _summaries() -> str:
    return "".join(f"  {name:<12}{_summary(path)}\n" for name, path in commands().items())


def _summary(path: Path) -> str:
    """The first line of a command's docstring, after its name, without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0].partition(": ")[2]


def _own_packages_first() -> None:
    """Let our packages win over folders of the same names in the working directory (`python -m` puts it first)."""
    spec = importlib.util.find_spec("framework")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places or Path(places[0]).resolve() != HERE.parent / "framework":
        sys.path.insert(0, str(HERE.parent))
        return
    from framework.cluster.checkout import strangers

    if strangers():
        sys.path.insert(0, str(HERE.parent))


def _deliberate(error: ValueError) -> bool:
    """Whether a `raise` of ours is where it comes from: then it is meant for the user, else it is a bug of ours."""
    origin = traceback.extract_tb(error.__traceback__)[-1]
    return Path(origin.filename).is_relative_to(HERE.parent) and (origin.line or "").startswith("raise")


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
