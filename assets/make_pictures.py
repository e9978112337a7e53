"""Make the pictures of the README from what the commands write.

    driftlens demo --html demo.html
    python assets/make_pictures.py demo.html assets/demo.png 1180 1180 760

Needs Chromium, chromedriver and selenium (in the development extra).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1.5",
]


def screenshot(
    page: Path, picture: Path, width: int = 1180, height: int = 1500, scroll: int = 0
) -> None:
    """A picture of a page, from ``scroll`` pixels below its top."""
    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(
            options=options, service=Service(shutil.which("chromedriver") or "chromedriver")
        )
        try:
            driver.get(page.resolve().as_uri())
            driver.execute_script("window.scrollTo(0, arguments[0])", scroll)
            time.sleep(0.5)
            driver.save_screenshot(str(picture))
        finally:
            driver.quit()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 6):
        sys.exit("usage: make_pictures.py PAGE.html PICTURE.png [WIDTH HEIGHT SCROLL]")
    size = [int(value) for value in sys.argv[3:]]
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]), *size)
