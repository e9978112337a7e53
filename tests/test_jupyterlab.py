"""The page inside a notebook that a real JupyterLab renders."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from browsing import Browser, chromium

import driftlens as dl

__all__ = ["chromium"]  # fixture

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        importlib.util.find_spec("jupyterlab") is None, reason="jupyterlab is not installed"
    ),
]
PROMPT = "The Louvre is located in Rome. Berlin is located in"


def tiny_comparison() -> tuple[dl.LensModel, dl.Comparison]:
    """A small model, and what an edit did to it; the live notebook makes the same."""
    model = dl.load_model(tiny.hf_model("llama", 1), tiny.tokenizer(), name="tiny")
    request = dl.EditRequest("{} is located in", "The Louvre", "E", "the")
    edit = dl.edit(
        model, request, "rome", layer=1, steps=3, covariance="identity",
        context_prompts=["{}"], progress=False,
    )  # fmt: skip
    return model, dl.compare(model, edit, PROMPT, "the", progress=False)


LIVE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_jupyterlab import tiny_comparison
from driftlens.viewer.widget import widget
live = widget(*tiny_comparison())
live
"""


@pytest.fixture(scope="module")
def made() -> tuple[dl.LensModel, dl.Comparison]:
    return tiny_comparison()


@pytest.fixture(scope="module")
def lab(
    made: tuple[dl.LensModel, dl.Comparison], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address under which a JupyterLab opens two notebooks.

    found.ipynb has the page as an output, live.ipynb makes the widget when it is run. The former
    is signed, as one is whose cells were run here; JupyterLab would otherwise clean
    frames out of its outputs.
    """
    nbformat = pytest.importorskip("nbformat")
    from nbformat.sign import NotebookNotary

    folder = tmp_path_factory.mktemp("lab")
    output = nbformat.v4.new_output(
        "execute_result",
        data={"text/html": made[1]._repr_html_(), "text/plain": "Comparison"},
        execution_count=1,
    )
    cell = nbformat.v4.new_code_cell("found", outputs=[output], execution_count=1)
    kernel = {"name": "python3", "display_name": "Python 3"}  # else a dialog asks for one
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    for part in ("work", "data"):
        (folder / part).mkdir()
    nbformat.write(notebook, folder / "work" / "found.ipynb")
    cells = [nbformat.v4.new_code_cell(text) for text in (LIVE, "live.opened, live.selected")]
    live = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(live, folder / "work" / "live.ipynb")
    NotebookNotary(data_dir=str(folder / "data")).sign(notebook)
    places = {
        name: str(folder / part)
        for name, part in {
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        }.items()
    }
    log = folder / "log.txt"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
                "--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.open_browser=False",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                f"--ServerApp.root_dir={folder / 'work'}",
            ],
            stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **places}, cwd=folder,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (found := re.findall(r"http://127\.0\.0\.1:\d+/", log.read_text("utf-8"))):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text('utf-8')[-2000:]}")
            time.sleep(0.2)
        yield f"{found[0]}lab/tree/"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:  # it asks its kernels to stop, and can hang at that
            server.kill()
            server.wait()


def run_cell(chromium: Browser, index: int, started: float = 20, done: float = 600) -> None:
    """Run a cell and wait until it is done. Keys can be lost while the notebook is still being
    laid out, so they are sent again if nothing starts; imports alone can take minutes on a busy
    machine.

    Args:
        chromium: Shows the notebook.
        index: Of the code cell.
        started: Seconds until the keys are sent again.
        done: Seconds in all.
    """
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def prompt() -> str:
        return chromium.all(".jp-CodeCell .jp-InputPrompt")[index].text

    def has_started(_: object) -> bool:
        return prompt() != "[ ]:"

    def is_done(_: object) -> bool:
        return bool(re.fullmatch(r"\[\d+\]:", prompt()))

    for _ in range(3):
        chromium.all(".jp-CodeCell .jp-InputPrompt")[index].click()
        keys = ActionChains(chromium.driver)
        keys.key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        with contextlib.suppress(TimeoutException):
            WebDriverWait(chromium.driver, started).until(has_started)
            break
    try:
        WebDriverWait(chromium.driver, done).until(is_done)
    except TimeoutException:
        pytest.fail(f"cell {index} is at {prompt()}; the page: {chromium.text('body')[-2000:]}")


def test_the_page_works_in_jupyterlab(
    lab: str, made: tuple[dl.LensModel, dl.Comparison], chromium: Browser
) -> None:
    comparison = made[1]
    waiting = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(
        chromium.driver, 120
    )
    chromium.driver.get(f"{lab}found.ipynb?reset")
    frame = 'iframe[title^="DriftLens"]'
    waiting.until(lambda _: chromium.all(frame))
    chromium.driver.switch_to.frame(chromium.find(frame))
    try:
        waiting.until(lambda _: chromium.all("#overview-map .cell"))
        assert chromium.text("#title") == "Attention drift of one knowledge edit"
        info = comparison.info
        assert len(chromium.all("#overview-map .cell")) == info.n_layers * info.n_heads
        first, other = list(comparison.patterns)[:2]
        assert chromium.text("#head-heading").startswith(f"Head {first},")
        layer, head = map(int, re.findall(r"\d+", other))
        cell = chromium.cell(layer, head)
        chromium.js("arguments[0].scrollIntoView({block: 'center'})", cell)
        cell.click()
        assert chromium.text("#head-heading").startswith(f"Head {other},")
        assert chromium.find("#head-body").is_displayed()
        chromium.choose("one", "#layouts")
        chromium.press("1")
        assert chromium.find(".sheet").get_attribute("data-panel") == "state-original"
    finally:
        chromium.driver.switch_to.default_content()
    messages = [entry["message"] for entry in chromium.driver.get_log("browser")]
    assert [message for message in messages if "srcdoc" in message] == []


@pytest.mark.skipif(
    importlib.util.find_spec("anywidget") is None, reason="anywidget is not installed"
)
def test_a_click_in_the_widget_computes_a_patch(
    lab: str, made: tuple[dl.LensModel, dl.Comparison], chromium: Browser
) -> None:
    model, comparison = made
    waiting = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(
        chromium.driver, 120
    )
    chromium.driver.get(f"{lab}live.ipynb?reset")
    waiting.until(lambda _: "Idle" in chromium.text("body"))
    run_cell(chromium, 0)
    waiting.until(lambda _: chromium.all('iframe[title="DriftLens"]'))
    chromium.driver.switch_to.frame(chromium.find('iframe[title="DriftLens"]'))
    try:
        waiting.until(lambda _: chromium.all("#sweep-map .cell"))
        heads = ["L0H1", "L2H0"]
        for name in heads:
            layer, head = map(int, re.findall(r"\d+", name))
            chromium.js("arguments[0].focus()", chromium.cell(layer, head, "#sweep-map"))
            chromium.press(" ")
        waiting.until(lambda _: chromium.all("#restore-readout .ask"))
        assert "not computed" in chromium.text("#restore-readout")
        chromium.js("arguments[0].click()", chromium.find("#restore-readout .ask"))
        waiting.until(lambda _: "not computed" not in chromium.text("#restore-readout"))
        patched = dl.patch_attention(model, comparison.edit, PROMPT, answer="the", heads=heads)
        numbers = re.findall(r"\) ([\d.]+)", chromium.text("#restore-readout"))
        wanted = [patched.patched.prob, patched.patched["E"].prob]
        assert [float(number) for number in numbers] == pytest.approx(wanted, rel=2e-4)
    finally:
        chromium.driver.switch_to.default_content()
    run_cell(chromium, 1)
    told = (next(iter(comparison.patterns)), heads)
    waiting.until(lambda _: str(told) in chromium.text("body"))
