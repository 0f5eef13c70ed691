"""What commands share: the terminal, which process this is, lists on the command line."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cytoclip.console import Console
from cytoclip.errors import UserError

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, on top of the file.", show_default=False)
]


def console() -> Console:
    """The terminal; silent in every process but the first."""
    return Console(quiet=not is_first_process())


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def speaks() -> bool:
    """Whether this process says what all of them met: the first one on its machine, whose files may differ."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def joined_numbers(words: list[str]) -> list[str]:
    """`--ks 1 5 10` as one word after the option: the original's way to write a list, which typer cannot parse."""
    for option in ("--ks", "--shots"):
        at = next((i for i, word in enumerate(words) if word == option or word.startswith(f"{option}=")), None)
        if at is not None:
            end = next((i for i in range(at + 1, len(words)) if not words[i].isdigit()), len(words))
            listed = [*words[at].partition("=")[2].split(), *words[at + 1 : end]]
            words = [*words[:at], option, *([" ".join(listed)] if listed else []), *words[end:]]
    return words


def numbers(text: str, option: str = "--ks") -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise UserError(f"{option} {text!r} is not a list of whole numbers from 1", f"such as {option} 1,5,10,50")
    return [int(word) for word in words]


def shares(text: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"--alphas {text!r} is not a list of numbers", "such as --alphas 0,0.25,0.5,0.75,1") from None
