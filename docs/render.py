"""Render the pages that are made from code; with --check, only say whether they are current.

python -m docs.render [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from cytoclip import config, families, kinds, results_schema
from docs import commands, modules

REFERENCE = Path(__file__).parent / "reference"
PAGES = {
    REFERENCE / "commands.md": commands.page,
    REFERENCE / "config.md": config.reference,
    REFERENCE / "families.md": families.page,
    REFERENCE / "findings.md": kinds.page,
    REFERENCE / "modules.md": modules.page,
    REFERENCE / "results.md": results_schema.page,
}


def main(check: bool) -> int:
    stale = [page for page, render in PAGES.items() if not page.is_file() or page.read_text() != render()]
    for page in stale:
        if check:
            print(f"{page.relative_to(Path.cwd())} is stale: run make docs", file=sys.stderr)
        else:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(PAGES[page]())
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
