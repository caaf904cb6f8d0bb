"""A headless Chromium for tests of pages, with a record of its requests and messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

MISSING = "needs Chromium, chromedriver and selenium"


def browser_problem() -> str | None:
    """Why no browser can be driven here; None if one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return MISSING
    return None if _chromium() and shutil.which("chromedriver") else MISSING


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """A window of 1440 x 1000 pixels."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = _chromium()
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1440,1000"):
            options.add_argument(f"--{argument}")
        # The browser's own services would contact their vendor.
        for argument in ("disable-background-networking", "disable-component-update", "no-first-run", "disable-sync"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def open(self, address: str) -> None:
        self.driver.get(address)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a function body in the page and return its result."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, what: str, is_true: Callable[[], Any] | str, seconds: float = 180.0) -> Any:
        """Wait until a function, or a script, returns something true; fail with `what`."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        ask = (lambda: self.run(is_true)) if isinstance(is_true, str) else is_true
        try:
            return WebDriverWait(self.driver, seconds, poll_frequency=0.1).until(lambda _: ask())
        except TimeoutException:
            messages = "; ".join(self.messages())
            raise AssertionError(f"the page did not show in {seconds:g} s: {what}; messages: {messages}") from None

    def text(self, selector: str) -> str:
        """Visible text of the first element."""
        return str(self.run("const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", selector))

    def messages(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def hosts(self) -> set[str]:
        """Hosts that the page requested anything from since the last call."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                address = urlsplit(message["params"]["request"]["url"])
                if address.scheme not in ("data", "blob"):
                    found.add(address.netloc)
        return found

    def close(self) -> None:
        self.driver.quit()
