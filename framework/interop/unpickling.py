"""Unpickling with a guest list: other tools' checkpoints are pickles, and a pickle may run any code.

    torch's own tensors and dtypes        let in
    classes named by the adaptor          let in, as they are or as a harmless stand-in
    everything else                       refused by name

Rule of this file: only imports of foreign checkpoints come here; nothing that we write or restore from is a pickle.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_BASICS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("builtins", "set"),
        ("builtins", "slice"),
        ("builtins", "complex"),
        ("argparse", "Namespace"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
    }
)


class Standin:
    """What a class that is not let in becomes where an adaptor says it is not needed: its state is dropped."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


Guests = Callable[[str, str], Any]
"""(module, name) -> the class to let in, or None."""


class GuestUnpickler(pickle.Unpickler):
    """Unpickles what is made of the basics and the guests. Raises pickle.UnpicklingError naming what is not."""

    def __init__(self, file: io.BufferedIOBase | Any, *, guests: Guests) -> None:
        super().__init__(file)
        self._guests = guests

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global in the pickle."""
        guest = self._guests(module, name)
        if guest is not None:
            return guest
        if (module, name) in _BASICS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not let in: a checkpoint has no need of it")


def load_pickle(file: Path, *, guests: Guests) -> Any:
    """A plain pickle file. Raises ValueError if it holds anything that is not let in."""
    try:
        return GuestUnpickler(io.BytesIO(file.read_bytes()), guests=guests).load()
    except OSError:
        raise
    except Exception as error:  # as below
        raise ValueError(f"{file}: must hold plain state, but {error}") from error


def load_torch(file: Path, *, stand_in: Mapping[str, type] | None = None) -> Any:
    """A `torch.save` file, by torch's own restricted loader; classes named in `stand_in` come as that type.

    Raises ValueError if it holds anything else.
    """
    guests = [(cls, name) for name, cls in (stand_in or {}).items()]
    try:
        with torch.serialization.safe_globals(guests):  # type: ignore[arg-type]
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # bytes that are no such file make an unpickler raise anything; all of it is told
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: must hold tensors and plain values only, but {reason}") from error
