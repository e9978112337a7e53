"""Make the pictures of the README from what the commands write.

    driftlens demo --html demo.html
    python assets/make_pictures.py demo.html assets/demo.png

Needs Chromium, chromedriver and selenium (in the development extra).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
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


def screenshot(page: Path, picture: Path, width: int = 1180, height: int = 1500) -> None:
    """A picture of the top of a page."""
    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(
            options=options, service=Service(shutil.which("chromedriver") or "chromedriver")
        )
        try:
            driver.get(page.resolve().as_uri())
            driver.implicitly_wait(2)
            driver.save_screenshot(str(picture))
        finally:
            driver.quit()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        sys.exit("usage: make_pictures.py PAGE.html PICTURE.png [WIDTH HEIGHT]")
    size = [int(value) for value in sys.argv[3:]]
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]), *size)
