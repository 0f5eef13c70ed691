"""mkdocs hooks: pages that stand elsewhere in the repository come into the site from there, with their links bent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FROM = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "measured.md": "bench/RESULTS.md",
}
_LINK = re.compile(r"(\]\()([^)#:]+)([)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `FROM`."""
    for page, source in FROM.items():
        files.append(File.generated(config, page, content=bent((ROOT / source).read_text(encoding="utf-8"))))
    return files


def bent(text: str) -> str:
    """Links between files of the repository, as links between pages of the site."""
    pages = {source: page for page, source in FROM.items()}

    def one(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        return f"{before}{pages.get(target, target.removeprefix('docs/'))}{after}"

    return _LINK.sub(one, text)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In guides, the same: what they say of files outside docs/."""
    depth = page.file.src_uri.count("/")
    for target, source in FROM.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{source})", f"]({'../' * depth}{target})")
    return markdown
