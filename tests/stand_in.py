"""open_clip without torchvision, which has no build beside the CPU's torch here: a stand-in that holds no code.

open_clip and timm import torchvision's transforms and one frozen BatchNorm at their top, and use neither to compute an
embedding. Each name of the stand-in is an empty class; model, tokenizer and forward pass are open_clip's own. timm lies
beside the other packages (Makefile) and is found only in here: accelerate imports it wherever it is.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.utils import import_utils

_KEPT: dict[str, ModuleType] = {}
_APART = str(Path(sys.prefix) / "apart")
_NAMES = ("open_clip", "timm", "torchvision")


@contextmanager
def open_clip() -> Iterator[Any]:
    """open_clip, importable while inside; nothing of it, nor of the stand-in, is left for other tests."""
    import_utils.is_torchvision_available()  # remembers that it is not there, before something of that name is
    finder = _Finder()
    sys.meta_path.append(finder)
    sys.path.append(_APART)
    sys.modules.update(_KEPT)
    try:
        yield importlib.import_module("open_clip")
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(_APART)
        for name in [name for name in sys.modules if name.partition(".")[0] in _NAMES]:
            _KEPT[name] = sys.modules.pop(name)


class _Named(type):
    """A class whose attributes, asked for, are classes like it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _made(name)


def _made(name: str) -> Any:
    return _Named(name, (), {"__init__": lambda *_, **__: None, "__call__": lambda _, value: value})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _made(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, *_: Any) -> Any:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0.0"  # type: ignore[attr-defined]
