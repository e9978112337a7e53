"""Make the pictures of the README and the documentation from what the commands write.

    driftlens demo --html demo.html
    python assets/make_pictures.py demo.html

Needs Chromium, chromedriver and selenium (in the development extra).
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

PICTURES = {
    "demo.png": ("#answers", "#overview"),
    "head.png": ("#head", "#pattern-key"),
    "restore.png": ("#sweep", "#restore"),
}
"""File names, and the first and the last element of the page that are on each."""

WIDTH, HEIGHT, SCALE = 1180, 6000, 1.5
"""Of the window, in pixels; tall enough that the whole page is drawn."""

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--window-size={WIDTH},{HEIGHT}",
]
BOX = """
const [first, last] = [...arguments].map((s) => document.querySelector(s).getBoundingClientRect());
return [first.top + scrollY, last.bottom + scrollY];
"""


def make_pictures(page: Path, folder: Path) -> list[Path]:
    """Pictures of parts of a page that ``driftlens demo`` or ``Comparison.save`` wrote."""
    options = webdriver.ChromeOptions()
    made = []
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        service = Service(shutil.which("chromedriver") or "chromedriver")
        with webdriver.Chrome(options=options, service=service) as driver:
            driver.get(page.resolve().as_uri())
            for name, (first, last) in PICTURES.items():
                top, bottom = driver.execute_script(BOX, first, last)
                clip = {"x": 0, "y": top - 16, "width": WIDTH, "height": bottom - top + 24}
                shot = driver.execute_cdp_cmd(
                    "Page.captureScreenshot", {"clip": {**clip, "scale": SCALE}}
                )
                made.append(folder / name)
                made[-1].write_bytes(base64.b64decode(shot["data"]))
    return made


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_pictures.py PAGE.html")
    for path in make_pictures(Path(sys.argv[1]), Path(__file__).parent):
        sys.stdout.write(f"wrote {path.name}\n")
