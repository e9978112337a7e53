"""Make the pictures of the README and the documentation.

    driftlens demo --html demo.html
    python assets/make_pictures.py demo.html     what that page shows
    python assets/make_pictures.py               charts of what is in assets/results

Needs Chromium, chromedriver and selenium (in the development extra).
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plotly.io as pio
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from driftlens.journal import digest

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
MORE = {
    "heads-gemma": ("heads", "gemma-3-270m", "shipped facts"),
    "table3-gemma": ("table3", "gemma-3-270m", "counterfact_wikidata_dev"),
}
"""Charts of other runs than an experiment's first: the experiment, the model, the data."""
DIGESTS = "digests.json"
"""In a folder of charts, what each was drawn from."""


@contextmanager
def chrome() -> Iterator[Any]:
    """A browser without a window."""
    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        service = Service(shutil.which("chromedriver") or "chromedriver")
        with webdriver.Chrome(options=options, service=service) as driver:
            yield driver


def photograph(driver: Any, first: str, last: str, target: Path, scale: float) -> Path:
    """What a page shows from one element to another, as wide as the window."""
    top, bottom = driver.execute_script(BOX, first, last)
    clip = {"x": 0, "y": max(0, top - 16), "width": WIDTH, "height": bottom - top + 24}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": {**clip, "scale": scale}})
    target.write_bytes(base64.b64decode(shot["data"]))
    return target


def make_pictures(page: Path, folder: Path) -> list[Path]:
    """Pictures of parts of a page that ``driftlens demo`` or ``Comparison.save`` wrote."""
    with chrome() as driver:
        driver.get(page.resolve().as_uri())
        return [
            photograph(driver, first, last, folder / name, SCALE)
            for name, (first, last) in PICTURES.items()
        ]


def make_charts(results: Path, folder: Path) -> list[Path]:
    """The chart of the first run of each experiment that was gathered, and of some others; and
    what each is of."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in results.glob("*.json")}
    gathered = {name: record["runs"] for name, record in sorted(found.items()) if "runs" in record}
    runs = {name: own[0] for name, own in gathered.items()}
    for name, (experiment, *of) in MORE.items():
        (runs[name],) = (
            run for run in gathered[experiment] if [run["model"]["name"], run["data"]] == of
        )
    folder.mkdir(exist_ok=True)
    made = []
    with tempfile.TemporaryDirectory() as pages, chrome() as driver:
        for name, run in runs.items():
            page = Path(pages) / f"{name}.html"
            figure = pio.from_json(json.dumps(run["figure"])).update_layout(width=WIDTH - 20)
            of = f"{run['model']['name']}, {run['data']}, {len(run['cases'])} cases"
            figure.layout.title.text += f"<br><sup>{of}</sup>"
            figure.layout.margin.t += 20
            figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
            driver.get(page.as_uri())
            box = ".plotly-graph-div"
            made.append(photograph(driver, box, box, folder / f"{name}.png", 1))
    digests = {name: digest(run["figure"]) for name, run in runs.items()}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")
    return made


if __name__ == "__main__":
    here = Path(__file__).parent
    if len(sys.argv) > 2:
        sys.exit("usage: make_pictures.py [PAGE.html]")
    pictures = (
        make_pictures(Path(sys.argv[1]), here)
        if len(sys.argv) == 2
        else make_charts(here / "results", here / "figures")
    )
    for path in pictures:
        sys.stdout.write(f"wrote {path.name}\n")
