"""Fine-tune CLIP on a folder of image-caption pairs, exactly, and say honestly how much better it got."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cytoclip.encoder import Encoder, load
    from cytoclip.library import evaluate, train
    from cytoclip.search import Index

__all__ = ["Encoder", "Index", "__version__", "evaluate", "load", "train"]

_FROM = {"Encoder": "encoder", "Index": "search", "load": "encoder", "evaluate": "library", "train": "library"}


def __getattr__(name: str) -> Any:
    """Each public name on first use: `import cytoclip` and `cytoclip --help` must not wait for torch."""
    import importlib  # here, so that it is no name of the package

    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
