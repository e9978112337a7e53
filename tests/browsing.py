"""A headless Chromium for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from driftlens.viewer import PageData, page

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
    "--window-size=1280,1000",
)


class Browser:
    """A headless Chromium, and short names for what the tests do with it."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self.folder = folder
        self.opened = 0

    def media(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def switch_media(self, scheme: str) -> None:
        """Let the system change its colours, and wait until the page was told."""
        self.js(
            "window.told = false;"
            "matchMedia('(prefers-color-scheme: dark)')"
            ".addEventListener('change', () => { window.told = true; }, {once: true})"
        )
        self.media(scheme)
        self.wait(lambda: self.js("return window.told"))

    def wait(self, until: Callable[[], Any], seconds: float = 30) -> None:
        """Wait for what the page does later."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda _: until())

    def open(self, data: PageData, width: int = 1280, scheme: str = "light") -> None:
        """Show a page of the viewer."""
        self.open_html(page(data), width, scheme)

    def open_html(
        self, text: str, width: int = 1280, scheme: str = "light", suffix: str = ".html"
    ) -> None:
        """Show any document."""
        self.opened += 1
        path = self.folder / f"page{self.opened}{suffix}"
        path.write_text(text, encoding="utf-8", newline="\n")
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
        )
        self.media(scheme)
        assert self.driver.get_log("browser") == []
        self.driver.get(path.as_uri())

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        found = self.driver.find_elements("css selector", selector)
        assert isinstance(found, list)
        return found

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_property("textContent"))

    def cell(self, layer: int, head: int, box: str = "#overview-map") -> Any:
        return self.find(f'{box} .cell[data-layer="{layer}"][data-head="{head}"]')

    def colour(self, element: Any) -> str:
        return str(self.js("return getComputedStyle(arguments[0]).backgroundColor", element))

    def hover(self, element: Any, x: float = 0, y: float = 0) -> None:
        """Put the pointer ``x, y`` away from the middle of an element."""
        from selenium.webdriver import ActionChains

        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        ActionChains(self.driver).move_to_element_with_offset(element, round(x), round(y)).perform()

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key, key)).perform()

    def choose(self, value: str, box: str = "#views") -> None:
        """Press a radio button or checkbox by its value."""
        self.js("arguments[0].click()", self.find(f'{box} input[value="{value}"]'))

    def unfold(self, details: str) -> None:
        """Open a ``<details>``, and wait for its ``toggle``, which comes after the click."""
        self.driver.execute_async_script(
            "const [details, done] = arguments;"
            "details.addEventListener('toggle', () => done(), {once: true});"
            "details.querySelector('summary').click()",
            self.find(details),
        )

    def focused(self) -> Any:
        return self.driver.switch_to.active_element

    def hover_matrix(self, panel: str, query: int, key: int, size: int) -> None:
        """Put the pointer on one cell of a matrix of ``size`` tokens."""
        sheet = self.find(f'.sheet[data-panel="{panel}"]')
        width = sheet.size["width"] / size
        self.hover(sheet, (key + 0.5 - size / 2) * width, (query + 0.5 - size / 2) * width)

    def pixel(self, panel: str, query: int, key: int, size: int) -> list[int]:
        """Colour in the middle of one cell of a matrix."""
        found = self.js(
            "const c = document.querySelector(arguments[0]); const w = c.width / arguments[3];"
            "const copy = document.createElement('canvas').getContext('2d');"
            "copy.drawImage(c, -(arguments[2] + 0.5) * w, -(arguments[1] + 0.5) * w);"
            "return [...copy.getImageData(0, 0, 1, 1).data]",
            f'.sheet[data-panel="{panel}"] canvas', query, key, size,
        )  # fmt: skip
        assert isinstance(found, list)
        return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((path for name in names if (path := shutil.which(name))), None)
    driver_path = shutil.which("chromedriver")
    if not binary or not driver_path:
        pytest.skip("no Chromium with its chromedriver on the PATH")
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver_path)
    with webdriver.Chrome(options=options, service=service) as driver:
        yield Browser(driver, folder)


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser; after the test, its console must be empty."""
    yield chromium
    console = chromium.driver.get_log("browser")
    assert console == []
    loaded = chromium.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in loaded if not name.startswith("blob:")] == []  # blob: what it saves
