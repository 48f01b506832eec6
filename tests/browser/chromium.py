"""A headless Chromium, and the chat page in it as a user sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.absent import absent

DESKTOP, PHONE = (1280, 800), (390, 844)
SWITCHES = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """The system's Chromium with an empty profile."""
    browser = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = which("chromedriver")
    if browser is None or driver is None:
        absent("the chat page in Chromium", "chromium and chromedriver are not installed", expected=False)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (*SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        chrome.set_script_timeout(60)
        yield chrome
    finally:
        chrome.quit()


class Page:
    """The chat page in a browser, and what a user does there."""

    def __init__(self, chrome: webdriver.Chrome) -> None:
        self.chrome = chrome

    def open(self, address: str) -> Page:
        self.chrome.get(address)
        self.until(lambda: self.js("return document.readyState") == "complete")
        return self

    def size(self, width: int, height: int, touch: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.chrome.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})

    def prefers(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """What the condition becomes, once it holds."""
        end = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass  # drawn anew between being found and being asked
            assert time.monotonic() < end, f"it does not come to pass; the page shows:\n{self.text('body')}"
            time.sleep(0.02)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def script(self, name: str) -> Any:
        """What a script beside this file returns."""
        return self.js(Path(__file__).with_name(name).read_text(encoding="utf-8"))

    def await_js(self, body: str, *arguments: Any) -> Any:
        """The result of an async function with `body`; it sees its arguments as `given`."""
        script = (
            "const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);"
            f"(async () => {{ {body} }})().then((value) => done({{value}}), (error) => done({{error: String(error)}}));"
        )
        outcome = self.chrome.execute_async_script(script, *arguments)
        assert "error" not in outcome, outcome["error"]
        return outcome.get("value")

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The visible element, once there is one."""
        return self.until(lambda: next((one for one in self.all(selector) if one.is_displayed()), None))

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)", selector)

    def click(self, selector: str) -> None:
        """Clicks what only shows under the pointer, too."""
        self.until(lambda: self.all(selector))
        self.js("document.querySelector(arguments[0]).click()", selector)

    def press(self, *keys: str) -> None:
        """Keys, the first ones held down, wherever the focus is."""
        actions = webdriver.ActionChains(self.chrome)
        for key in keys[:-1]:
            actions.key_down(key)
        actions.send_keys(keys[-1])
        for key in reversed(keys[:-1]):
            actions.key_up(key)
        actions.perform()

    # --- conversations

    def ask(self, text: str, wait: bool = True) -> None:
        before = len(self.all(".turn"))
        prompt = self.one("#prompt")
        prompt.send_keys(text, Keys.ENTER)
        self.until(lambda: len(self.all(".turn")) > before)
        if wait:
            self.settled()

    def settled(self) -> None:
        self.until(lambda: not self.all(".turn.answering"))

    @property
    def questions(self) -> list[str]:
        return self.texts(".bubble")

    @property
    def answers(self) -> list[str]:
        return self.texts(".answer .markdown")

    @property
    def id(self) -> str:
        return self.js("return location.hash.slice(1)")

    def mistakes(self) -> list[str]:
        """What the browser's console complained of, but for answers with an error status."""
        complaints = [entry["message"] for entry in self.chrome.get_log("browser")]
        return [message for message in complaints if "Failed to load resource" not in message]
