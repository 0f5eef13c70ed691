"""Pages as one file each: a template of ours, every text of the data escaped, and no way to ask for anything."""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A template of the package, filled in; `page_style.html` has what all of them look like."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def data_uri(jpeg: bytes) -> str:
    """A picture inside a page."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _source(name: str) -> str:
    return resources.files("cytoclip").joinpath(name).read_text(encoding="utf-8")
