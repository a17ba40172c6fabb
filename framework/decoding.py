"""Decoding: from plain values, as YAML gives them, to typed frozen dataclasses, driven by the annotations alone.

    {"num_steps": -3}   +   num_steps: PositiveInt   ->   optim.num_steps: must be a positive integer, got -3; ...

An `Annotated[T, Rule]` is a T that obeys the rule. Other marks: a field may stand under another key (`Keyed`), have a
door of its own (`Via`), or take every key that has no field (`Rest`). Every refusal is a ValueError in one grammar:
`<where>: <what must hold>, got <value>; <what to do>`.

Rule of this file: it knows types, and no key of any config.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be beyond its type: in words, as a test, and an example that passes."""

    says: str
    holds: Callable[[Any], bool]
    example: object


PositiveInt = Annotated[int, Rule("a positive integer", lambda v: v > 0, 4)]
Count = Annotated[int, Rule("an integer of at least 0", lambda v: v >= 0, 0)]
PositiveFloat = Annotated[float, Rule("a positive number", lambda v: 0 < v < float("inf"), 1.5)]
NonNegative = Annotated[float, Rule("a number of at least 0", lambda v: 0 <= v < float("inf"), 0.1)]
Fraction = Annotated[float, Rule("a number from 0 to 1", lambda v: 0 <= v <= 1, 0.1)]
Below1 = Annotated[float, Rule("a number from 0 to below 1", lambda v: 0 <= v < 1, 0.9)]

_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
_EXAMPLE: dict[Any, object] = {bool: "true", int: 4, float: 1.5}
_OFF = ("disabled", "off", "no", "none", "false", "null")  # all mean the same, however unlike they are spelt


@dataclass(frozen=True, slots=True)
class Keyed:
    """Mark of a field that stands in the config under another key than its own name."""

    key: str


@dataclass(frozen=True, slots=True)
class Rest:
    """Mark of a field that takes every key for which there is no other field."""


@dataclass(frozen=True, slots=True)
class Via:
    """Mark of a field with a door of its own: `decode(value, where)` and its inverse."""

    decode: Callable[[Any, str], Any]
    encode: Callable[[Any], Any]


def decode(kind: type[T], value: object, where: str) -> T:
    """`value` as a `kind` (a dataclass). `where` is its dotted key, "" at the top. Raises ValueError."""
    decoded: T = _dataclass(kind, value, where)
    return decoded


def encode(value: Any) -> Any:
    """The inverse of `decode`: dataclasses to dicts under their config keys, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain: dict[str, Any] = {}
        for entry in _entries(type(value)):
            item = getattr(value, entry.name)
            item = entry.via.encode(item) if entry.via is not None else encode(item)
            plain |= item if entry.rest else {entry.key: item}
        return plain
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def dotted(where: str, key: object) -> str:
    """The full name of a key."""
    return f"{where}.{key}" if where else str(key)


def unknown(where: str, key: object, valid: Iterable[str]) -> ValueError:
    """The refusal of a key that does not exist, with the nearest that does."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    if near:
        return ValueError(f"{dotted(where, key)}: no such key; did you mean {dotted(where, near[0])}?")
    known = f"{where or 'the config'} has {', '.join(names)}" if names else f"{where} has no keys of its own"
    return ValueError(f"{dotted(where, key)}: no such key; {known}")


def show(value: object) -> str:
    """A value as a person would have typed it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A field of a dataclass, as the config sees it."""

    name: str
    key: str
    hint: Any
    rest: bool
    via: Via | None
    required: bool


@functools.cache
def _entries(kind: Any) -> tuple[_Entry, ...]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(_entry(field, hints[field.name]) for field in dataclasses.fields(kind))


def _entry(field: dataclasses.Field[Any], hint: Any) -> _Entry:
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    key = next((mark.key for mark in marks if isinstance(mark, Keyed)), field.name)
    via = next((mark for mark in marks if isinstance(mark, Via)), None)
    is_rest = any(isinstance(mark, Rest) for mark in marks)
    return _Entry(field.name, key, hint, is_rest, via, field.default is dataclasses.MISSING)


def _dataclass(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or 'config'}: must be a group of keys, got {show(value)}; see configs/")
    entries = {entry.key: entry for entry in _entries(kind) if not entry.rest}
    spare = {key: item for key, item in value.items() if key not in entries}
    catch_all = next((entry.name for entry in _entries(kind) if entry.rest), None)
    if spare and catch_all is None:
        raise unknown(where, next(iter(spare)), entries)
    found: dict[str, Any] = {} if catch_all is None else {catch_all: spare}
    for key, entry in entries.items():
        if key in value:
            decoder = entry.via.decode if entry.via is not None else functools.partial(_value, entry.hint)
            found[entry.name] = decoder(value[key], dotted(where, key))
        elif entry.required:
            raise ValueError(f"{dotted(where, key)}: must be given, got nothing; {_hint(entry.hint, where, key)}")
    return _construct(kind, found, where)


def _construct(kind: Any, found: dict[str, Any], where: str) -> Any:
    """Build it; what its own `__post_init__` refuses is said under the place where it stands."""
    try:
        return kind(**found)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where.partition("[")[0]) else f"{where}: {text}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """One value by its annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)
    if origin in (Union, types.UnionType):
        return _union(hint, args, value, where)
    if origin is Literal:
        return _literal(hint, args, value, where)
    if origin is tuple:
        return _tuple(hint, args, value, where)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return _mapping(hint, value, where)
    if hint is Any:
        return value
    base, rule = (args[0], _rule(hint)) if origin is Annotated else (hint, None)
    plain = _scalar(base, value)
    if plain is None or (rule is not None and not rule.holds(plain)):
        raise _refusal(hint, value, where)
    return plain


def _rule(hint: Any) -> Rule | None:
    return next((mark for mark in typing.get_args(hint)[1:] if isinstance(mark, Rule)), None)


def _scalar(base: type, value: Any) -> Any:
    """The value as bool, int, float or str, or None if it is not one. `1e3` is an integer, `true` is not."""
    if base is not bool and isinstance(value, bool):
        return None
    if base is float and isinstance(value, int):
        return float(value)
    if base is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, base) else None


def _union(hint: Any, options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    kinds = [option for option in options if option is not types.NoneType]
    for option in kinds:
        try:
            return _value(option, value, where)
        except ValueError:
            if len(kinds) == 1 and typing.get_origin(option) not in (Annotated, Literal, None):
                raise
    raise _refusal(hint, value, where)


def _literal(hint: Any, options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value in options:
        return value
    off = [option for option in options if option in _OFF and str(value).lower() in _OFF]
    near = off or difflib.get_close_matches(str(value), map(str, options), n=1, cutoff=0.5)
    advice = f"did you mean {where}={near[0]}?" if near else f"for example {where}={options[0]}"
    raise ValueError(f"{where}: must be {_says(hint)}, got {show(value)}; {advice}")


def _tuple(hint: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    open_ended = args[-1] is Ellipsis
    if not isinstance(value, list | tuple) or (not open_ended and len(value) != len(args)):
        raise _refusal(hint, value, where)
    kinds = [args[0]] * len(value) if open_ended else args
    return tuple(_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _mapping(hint: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _refusal(hint, value, where)
    return {str(key): item for key, item in value.items()}


def _refusal(hint: Any, value: object, where: str) -> ValueError:
    group, _, key = where.rpartition(".")
    return ValueError(f"{where}: must be {_says(hint)}, got {show(value)}; {_hint(hint, group, key)}")


def _hint(hint: Any, where: str, key: str) -> str:
    example = _example(hint)
    return f"for example {dotted(where, key)}={example}" if example is not None else "see configs/"


def _says(hint: Any) -> str:
    """An annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rule = _rule(hint)
        return rule.says if rule is not None else _says(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_says(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin is tuple:
        return f"a list of {_says(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)} values"
    if dataclasses.is_dataclass(hint) or origin in (dict, Mapping) or hint is dict:
        return "a group of keys"
    return _PLAIN.get(hint, str(hint))


def _example(hint: Any) -> object | None:
    """A value that the annotation admits, or None if there is no telling one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rule = _rule(hint)
        return rule.example if rule is not None else _example(args[0])
    if origin in (Union, types.UnionType, Literal):
        return _example(args[0]) if origin is not Literal else args[0]
    return _EXAMPLE.get(hint)
