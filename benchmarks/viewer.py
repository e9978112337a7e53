"""Size, first paint, readiness and memory of the page, for prompts of several lengths.

    python benchmarks/viewer.py

makes pages for a model of 30 x 9 heads with random but plausible attention in three states, opens
each in a headless Chromium several times, writes ``assets/results/viewer.json`` and prints a table.

- *first paint*: ``first-contentful-paint`` of the browser's Paint Timing;
- *ready*: the mark ``driftlens-ready``, which the page sets when everything answers; both are
  counted from the start of the navigation, and are medians over the runs;
- *memory*: the JavaScript heap in use after a collection of garbage, with the first head opened.

How many heads' token-to-token attention a page holds is what ``dl.compare`` chooses by default.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from driftlens import __version__
from driftlens.comparison import heads_that_fit
from driftlens.viewer import HeadSet, PageData, Restored, State, Sweep, page

LAYERS, HEADS = 30, 9
LENGTHS = (32, 128, 512)
STATES = ("original", "edited", "sadr")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--window-size=1280,1000",
)
RESULT = Path(__file__).parent.parent / "assets" / "results" / "viewer.json"


def rows_of_attention(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """A causal attention matrix [query, key] with a sink at token 0."""
    scores = rng.normal(0.0, 2.0, (tokens, tokens))
    scores[:, 0] += 3.0
    scores[np.triu_indices(tokens, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def data_of(tokens: int) -> PageData:
    """A page with every part, for a prompt of so many tokens."""
    rng = np.random.default_rng(tokens)
    attention = {state: rng.beta(0.8, 14.0, (LAYERS, HEADS)) for state in STATES}
    names = [f"L{i // HEADS}H{i % HEADS}" for i in rng.permutation(LAYERS * HEADS)]
    patterns: dict[str, dict[str, Any]] = {}
    for name in names[: heads_that_fit(tokens, len(STATES))]:
        layer, head = map(int, name[1:].split("H"))
        patterns[name] = {state: rows_of_attention(rng, tokens) for state in STATES}
        for state, matrix in patterns[name].items():
            attention[state][layer, head] = matrix[-1, 5]
    starts = range(LAYERS - 5)
    return PageData(
        title="Attention drift of one knowledge edit",
        subtitle="",
        tokens=[f" word{i}" for i in range(tokens)],
        subject_span=(2, 6),
        query=tokens - 1,
        states=[State(key, key.capitalize()) for key in STATES],
        attention=attention,
        kl={state: rng.gamma(1.0, 0.1, (LAYERS, HEADS)) for state in STATES[1:]},
        patterns=patterns,
        sweep=Sweep(
            rng.normal(0, 0.05, (LAYERS, HEADS)),
            rng.normal(0, 0.1, LAYERS),
            [(start, start + 6, float(rng.normal(0, 0.2))) for start in starts],
        ),
        restored=Restored(
            (0.9, 0.01), (0.1, 0.8), (0.7, 0.1),
            rng.uniform(size=(LAYERS, HEADS, 2)),
            rng.uniform(size=(LAYERS, 2)),
            [(start, start + 6, *rng.uniform(size=2)) for start in starts],
            [HeadSet(names[:k], *rng.uniform(size=2)) for k in (2, 3, 5, 10, 20, 50, 100)],
        ),
        answer="Paris",
        target_new="Rome",
        probabilities=[("Original", 0.9, 0.01), ("Edited", 0.1, 0.8)],
    )  # fmt: skip


def measure(path: Path, profile: Path) -> dict[str, float]:
    """Open a page once in a fresh browser: first paint and readiness in ms, memory in bytes."""
    options = webdriver.ChromeOptions()
    names = ("chromium", "chromium-browser", "google-chrome")
    options.binary_location = next(found for name in names if (found := shutil.which(name)))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.get(path.as_uri())
        first = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        paint = WebDriverWait(driver, 60).until(lambda d: d.execute_script(f"return {first}"))
        ready = driver.execute_script(
            "return performance.getEntriesByName('driftlens-ready')[0].startTime"
        )
        driver.execute_cdp_cmd("Performance.enable", {})
        driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        heap = next(m["value"] for m in metrics if m["name"] == "JSHeapUsedSize")
        return {"first_paint_ms": paint, "ready_ms": ready, "heap_bytes": heap}


def run(lengths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """All measurements, JSON-ready."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in lengths:
            data = data_of(tokens)
            path = Path(folder) / f"{tokens}.html"
            path.write_text(page(data), encoding="utf-8", newline="\n")
            found = [measure(path, Path(folder) / f"profile{tokens}-{i}") for i in range(repeats)]
            rows.append(
                {
                    "tokens": tokens,
                    "stored_heads": len(data.patterns),
                    "states": len(STATES),
                    "file_bytes": path.stat().st_size,
                    **{key: float(np.median([f[key] for f in found])) for key in found[0]},
                }
            )
    return {
        "command": "python benchmarks/viewer.py",
        "model": f"{LAYERS} layers x {HEADS} heads, random attention",
        "repeats": repeats,
        "rows": rows,
        "platform": platform.platform(),
        "driftlens": __version__,
    }


def markdown(result: dict[str, Any]) -> str:
    """The measurements as a table."""
    lines = [
        "| tokens | stored heads | file | first paint | ready | JavaScript heap |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['tokens']} | {row['stored_heads']} | {row['file_bytes'] / 1e6:.2f} MB "
        f"| {row['first_paint_ms']:.0f} ms | {row['ready_ms']:.0f} ms "
        f"| {row['heap_bytes'] / 1e6:.1f} MB |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="how often each page is opened")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the numbers go")
    arguments = parser.parse_args()
    result = run(LENGTHS, arguments.repeats)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(result))
