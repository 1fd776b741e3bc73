"""The two pickles inside a distributed checkpoint, read without running anything that they name.

``.metadata`` (torch.distributed.checkpoint's description of all tensors) and ``data.pkl`` (the head of every tensor
that torch.save wrote) are pickles. Every class or function they name becomes a plain :class:`Record` of what it would
have been called with; nothing is imported or called. Names outside the short lists below are refused.
"""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from r1_megatron.checkpoint.files.dtypes import FROM_TORCH

# Dataclasses, enums and plans of the writers; what follows them is only stored.
_RECORD_MODULES = (
    "torch.distributed.checkpoint.",
    "megatron.core.dist_checkpointing.",
)
_RECORD_NAMES = {
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch.storage", "UntypedStorage"),
    # The folder that was written into.
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class Record:
    """Stands for an object whose class is not wanted: ``args`` it was made with, ``state`` it was given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, field: str) -> Any:
        """A field of the object, ``None`` if it has none of this name."""
        return self.state.get(field) if isinstance(self.state, dict) else None


@dataclass(frozen=True, eq=False)
class Named:
    """An object to be pickled, whose class is only named and not imported: a call of it with ``args``; or, as
    dataclasses are, an instance with ``state``; or, with ``args`` ``None``, what has that name itself."""

    module: str
    name: str
    args: tuple[Any, ...] | None = ()
    state: Any = None


@dataclass(frozen=True, eq=False)
class PersistentId:
    """What torch.save writes in a storage's place, to be found under it elsewhere."""

    value: tuple[Any, ...]


# The pickler in Python: the one in C imports whatever it writes the name of.
_PythonPickler: Any = vars(pickle)["_Pickler"]


class _Pickler(_PythonPickler):
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Named):
            super().save(obj, save_persistent_id)
            return
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        if obj.args is None:
            return
        self.save(obj.args)
        if obj.state is None:
            self.write(pickle.REDUCE)
        else:
            self.write(pickle.NEWOBJ)
            self.save(obj.state)
            self.write(pickle.BUILD)

    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, PersistentId) else None


def dump_named(value: Any, file: IO[bytes]) -> None:
    """Pickle ``value``: plain data with :class:`Named` and :class:`PersistentId` objects in it."""
    _Pickler(file, protocol=2).dump(value)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not name.isidentifier():  # "os.system" of a module that imports os
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no class")
        if module == "torch":
            if name == "Size":
                return tuple
            if name in FROM_TORCH:
                return FROM_TORCH[name]  # a dtype, by its name in safetensors
            if name.endswith("Storage"):
                return type(name, (Record,), {})
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in _RECORD_NAMES or f"{module}.".startswith(_RECORD_MODULES):
            return type(name, (Record,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Gate(_Unpickler):
    """Refuses whatever an ordinary unpickler could run: every name has to be a class of the very module it is said
    to be in."""

    def find_class(self, module: str, name: str) -> Any:
        stand_in = super().find_class(module, name)
        if module != "torch" and (module, name) not in {*_RECORD_NAMES, ("collections", "OrderedDict")}:
            found = getattr(importlib.import_module(module), name, None)
            if not isinstance(found, type) or found.__module__ != module:
                raise pickle.UnpicklingError(f"it names {module}.{name}, which is no class")
        return stand_in


def check_pickle(path: str | Path) -> None:
    """Look through a pickle before a library reads it in earnest, as PyTorch does with ``.metadata``.

    Raises:
        pickle.UnpicklingError: it is damaged, or names something else than the classes that belong there.
    """
    with open(path, "rb") as file:
        _load(_Gate(file))


def load_restricted(file: IO[bytes]) -> Any:
    """The pickle in ``file``, with a :class:`Record` for every object.

    Raises:
        pickle.UnpicklingError: it is damaged, or names something that is not in the lists above.
    """
    return _load(_Unpickler(file))


def _load(unpickler: pickle.Unpickler) -> Any:
    try:
        return unpickler.load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error!s:.200}") from error
