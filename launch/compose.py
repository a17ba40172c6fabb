"""Compose: from a command line to plain values, by Hydra, and from Hydra's errors to ours.

    holdfast train model=tiny optim.lr=1e-3,3e-3 --multirun
                   \\________ overrides ________/ \\ flags /      -> task({"model": {...}, ...}), once for each job

Hydra's own flags work (`--cfg job`, `--info`, `--multirun` with any sweeper, `--config-dir`). The composed config
leaves this file as dicts and lists with all interpolations resolved.

Rule of this file: the only one that knows Hydra. It does not know what any key means.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.decoding import unknown

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
CHOICES = dict.fromkeys(("--cfg", "-c"), ("job", "hydra", "all"))
INTERRUPTED = 130
FLAGS = (
    "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc",
    "--config-dir", "-cd", "--info", "-i", "--hydra-help",
)  # fmt: skip

Task = Callable[[dict[str, Any]], int]


def run_composed(command: str, arguments: Sequence[str], task: Task) -> int:
    """Compose `train.yaml` with the arguments and run `task` on it: once, or once for each job of a sweep.

    Returns the largest exit code of the jobs, 0 when only shown. Raises ValueError for whatever cannot be composed.
    """
    refuse_unknown_flags(arguments)
    codes: list[int] = []
    failures: list[BaseException] = []

    def job(config: DictConfig) -> None:
        if failures or INTERRUPTED in codes:
            return  # the rest of a sweep
        try:
            codes.append(task(_plain(config)))
        except BaseException as error:  # raised below: Hydra would put a heading of its own before it
            failures.append(error)

    entry = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")(job)
    with _command_line(command, arguments):
        try:
            entry()
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ValueError(explain(error, overrides_of(arguments))) from error
    for failure in failures:
        if isinstance(failure, OmegaConfBaseException):
            raise ValueError(explain(failure, overrides_of(arguments))) from failure
        raise failure
    return max(codes, default=0)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The plain values of `train.yaml` under these overrides. Raises ValueError."""
    try:
        return _plain(_compose(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, overrides)) from error


def groups() -> dict[str, tuple[str, ...]]:
    """The config groups, and the options of each."""
    folders = sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {path.name: tuple(sorted(file.stem for file in path.glob("*.yaml"))) for path in folders}


def refuse_unknown_flags(arguments: Sequence[str]) -> None:
    """Raises ValueError for an option, or a value of one, that nobody knows."""
    for word in arguments:
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag not in FLAGS:
            near = difflib.get_close_matches(flag, [f for f in FLAGS if f.startswith("--")], n=1, cutoff=0.5)
            raise ValueError(f"{flag}: no such option; " + (f"did you mean {near[0]}?" if near else "see --help"))
    for flag, choices in CHOICES.items():
        for before, word in zip(arguments, [*arguments[1:], ""], strict=False):
            if before == flag and word not in choices:
                raise ValueError(
                    f"{flag}: must be one of {', '.join(choices)}, got {word!r}; for example {flag} {choices[0]}"
                )


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The words that are overrides: what is neither a flag nor the value of one."""
    takes_value = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i")
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in takes_value]


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line in our grammar for what Hydra refused."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: must read like key=value; quote what the shell or Hydra would take apart"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_option(error)
    first = str(error).partition("\n")[0].rstrip(".")
    if first.startswith("Ambiguous value for argument"):
        word = first.split("'")[1]
        return f"{word.partition('=')[0]}: must be one value, got {word.partition('=')[2]}; for one run each add --multirun"
    if first.startswith("Could not append to config"):
        key = first.split("'")[1]
        return f"+{key}: must be a new key, got one that exists; leave out the +"
    if first.startswith("Config group override must be"):
        return _no_choice(overrides)
    strange = _unknown_key(overrides)
    if strange is not None:
        return str(strange)
    place = getattr(error, "full_key", None)
    return f"{place}: {first}; see configs/" if place else f"config: {first}; see holdfast train --help"


def _no_such_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or groups().get(group, ()))
    if not options:
        return f"{group or 'config'}: there is no file {error.missing_cfg_file}.yaml; see holdfast train --help"
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
    advice = f"did you mean {group}={near[0]}?" if near else f"for example {group}={options[0]}"
    return f"{group}: must be one of {', '.join(options)}, got '{option}'; {advice}"


def _no_choice(overrides: Sequence[str]) -> str:
    """The refusal of a group that was given something else than one of its options."""
    known = groups()
    wrong = [word for word in overrides if word.partition("=")[0] in known]
    group, _, value = (wrong or ["config="])[0].partition("=")
    return f"{group}: must be one of {', '.join(known.get(group, ()))}, got {value}; see holdfast train --help"


def _unknown_key(overrides: Sequence[str]) -> ValueError | None:
    """The refusal of the first override whose key is not in the config, or None."""
    known = groups()
    parsed = [o for o in OverridesParser.create().parse_overrides(list(overrides)) if o.type.name == "CHANGE"]
    chosen = [o.input_line or "" for o in parsed if o.key_or_group in known and not o.is_sweep_override()]
    try:
        keys = sorted(_keys(_plain(_compose(chosen))))
    except (HydraException, OmegaConfBaseException):
        return None
    for override in parsed:
        key = override.key_or_group
        if key not in keys and key not in known and not override.is_hydra_override():
            return _nearest_key(key, keys)
    return None


def _nearest_key(key: str, keys: Sequence[str]) -> ValueError:
    """Nearest by the whole name, then by its last part, else the keys of its group."""
    group, _, last = key.rpartition(".")
    ends = [k for k in keys if k.rpartition(".")[2] == last]
    near = [*difflib.get_close_matches(key, keys, n=1, cutoff=0.75), *ends]
    if near:
        return ValueError(f"{key}: no such key; did you mean {near[0]}?")
    siblings = [k.removeprefix(f"{group}.") if group else k for k in keys if k.rpartition(".")[0] == group]
    return unknown(group, last, siblings or [k for k in keys if "." not in k])


def _keys(values: dict[str, Any], where: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{where}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{where}{key}.")


def _compose(overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="holdfast"):
        return hydra.compose("train", list(overrides))


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@contextmanager
def _command_line(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Show Hydra these arguments and let its errors through to us."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [f"holdfast {command}", *arguments], "1"
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
