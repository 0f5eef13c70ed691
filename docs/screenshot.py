"""Photograph the search page for its guide: python -m docs.screenshot INDEX, the index of the demo's data.

cytoclip demo --to demo
cytoclip index demo/run demo/data --to demo/index
python -m docs.screenshot demo/index
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from cytoclip import files, serve
from cytoclip.search import Index
from cytoclip.serve import Where

TARGET = Path(__file__).parent / "images" / "serve.png"
QUERY = "A pair of koilocytes on a clean background. Orange, keratinised cytoplasm with a clear perinuclear halo"


def main(folder: Path) -> None:
    """Ask what the guide asks, and keep what a browser shows."""
    where = Where(port=0)
    app = serve.application(Index.open(folder), where)
    with serve.listening(where) as ears, serve.running(app, ears), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1180, "height": 800}, color_scheme="light", reduced_motion="reduce")
        page.goto(serve.url(where.host, ears.getsockname()[1]))
        page.get_by_label("Text", exact=True).fill(QUERY)
        page.keyboard.press("Enter")
        page.locator(".hit").first.wait_for()
        page.evaluate("Promise.all([...document.querySelectorAll('.hit img')].slice(0, 5).map(one => one.decode()))")
        shot = page.screenshot()
        browser.close()
    written = io.BytesIO()
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(128).save(written, "PNG", optimize=True)
    files.write_bytes(TARGET, written.getvalue())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
