"""Headless Chromium, driven by selenium: what the tests of the page share."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.support.serving import PATIENCE_SECONDS

ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
PHONE_WIDTH, DESKTOP_WIDTH, HEIGHT = 390, 1280, 900  # pixels


class Browser:
    """A window of Chromium.

    Attributes
    ----------
    driver
        The driver of selenium.
    """

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        for argument in ARGUMENTS:
            options.add_argument(argument)
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver") or "")
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(PATIENCE_SECONDS)

    def close(self) -> None:
        """End Chromium."""
        self.driver.quit()

    def open(self, url: str, *, width: int = DESKTOP_WIDTH, scheme: str = "light") -> None:
        """Open a page in a window of a width in pixels, in the "light" or the "dark" scheme."""
        self.show(width=width, scheme=scheme)
        self.driver.get(url)

    def show(self, *, width: int = DESKTOP_WIDTH, scheme: str = "light") -> None:
        """Change the width of the window, and its color scheme."""
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1}
        metrics["mobile"] = width < 600
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def run(self, code: str, *arguments: Any) -> Any:
        """Return the value of the body of a JavaScript function."""
        return self.driver.execute_script(code, *arguments)

    def call(self, module: str, expression: str, *arguments: Any) -> Any:
        """Return the value of an expression of a module `m` of the page and of arguments `a`."""
        code = (
            "const a = [...arguments], done = a.pop();"
            f"import('/page/{module}').then(async (m) => {expression})"
            ".then(done, (error) => done({ error: String(error) }));"
        )
        found = self.driver.execute_async_script(code, *arguments)
        assert not isinstance(found, dict) or "error" not in found, found
        return found

    def find(self, selector: str) -> WebElement:
        """Return the first element of a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[WebElement]:
        """Return all elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Return the text of each element of a CSS selector, hidden ones included."""
        return list(
            self.run("return [...document.querySelectorAll(arguments[0])].map(x => x.textContent)",
                     selector)
        )  # fmt: skip

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} did not become true"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys one after another; "CONTROL+ENTER" is two at once."""
        for key in keys:
            *held, last = [getattr(Keys, name) for name in key.split("+")]
            actions = ActionChains(self.driver)
            for one in held:
                actions.key_down(one)
            actions.send_keys(last)
            for one in reversed(held):
                actions.key_up(one)
            actions.perform()

    def slide(self, selector: str, value: float) -> None:
        """Move a slider, or fill in a number."""
        self.run(
            "const x = document.querySelector(arguments[0]); x.value = arguments[1];"
            "x.dispatchEvent(new Event('input', { bubbles: true }))",
            selector,
            value,
        )

    def messages(self) -> list[str]:
        """Return the warnings and errors of the console since the last call."""
        return [
            one["message"]
            for one in self.driver.get_log("browser")
            if one["level"] in ("WARNING", "SEVERE")
        ]

    def violations(self) -> list[str]:
        """Return the violations of accessibility rules that axe-core finds on the page."""
        found = importlib.util.find_spec("axe_playwright_python")
        assert found is not None
        assert found.submodule_search_locations
        axe = Path(found.submodule_search_locations[0], "axe.min.js")
        self.run(axe.read_text("utf-8"))
        code = "axe.run(document, { resultTypes: ['violations'] }).then(arguments[0])"
        results = self.driver.execute_async_script(code)["violations"]
        return [f"{one['id']}: {one['nodes'][0]['html']}" for one in results]
