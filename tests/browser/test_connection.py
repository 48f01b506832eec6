"""The chat page when the server refuses it, goes away, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from bmojo_edge.engine import LM
from tests.browser.chromium import Page
from tests.browser.serving import Served

pytestmark = pytest.mark.browser

LONG = "The river runs to the sea. " * 60


@pytest.fixture
def locked(lm: LM, tmp_path: Path) -> Iterator[Served]:
    served = Served(lm, tmp_path, key="sesame-1")
    yield served
    served.stop()


@pytest.fixture
def mortal(lm: LM, tmp_path: Path) -> Iterator[Served]:
    served = Served(lm, tmp_path)
    yield served
    served.stop()


def test_the_key_is_asked_for_once(page: Page, locked: Served) -> None:
    locked.says("Hello.")
    page.open(locked.address)
    assert not page.one("#key").find_elements("css selector", "[role=alert]:not([hidden])")
    page.one("#key input").send_keys("wrong", Keys.ENTER)
    page.until(lambda: page.all("#key-refused:not([hidden])"))
    page.one("#key input").send_keys("sesame-1", Keys.ENTER)
    page.until(lambda: not page.all("#key[open]"))
    page.ask("one")
    assert page.answers == ["Hello."]
    page.chrome.refresh()
    page.until(lambda: page.answers == ["Hello."])
    assert not page.all("#key[open]")
    assert "sesame-1" not in page.js("return JSON.stringify(localStorage)")


def test_without_the_key_the_page_says_what_to_do(page: Page, locked: Served) -> None:
    page.open(locked.address)
    page.one("#key")
    page.press(Keys.ESCAPE)
    page.until(lambda: "API key" in page.text("#notice"))


def test_the_server_goes_in_the_middle_of_an_answer_and_comes_back(page: Page, mortal: Served) -> None:
    mortal.says("Hello.")
    page.open(mortal.address)
    page.ask("one")
    mortal.says(LONG, pause=0.05)
    page.ask("two", wait=False)
    page.until(lambda: len(page.answers[-1]) > 20)
    mortal.stop()
    page.settled()
    page.one("#offline")
    assert page.questions == ["one", "two"]
    assert LONG.startswith(page.answers[-1]) and page.answers[-1]

    page.one("#prompt").send_keys("while it is away")
    mortal.says("Again.")
    mortal.start()
    page.until(lambda: not page.all("#offline:not([hidden])"))
    assert page.js("return document.getElementById('prompt').value") == "while it is away"
    page.click(".failed .note button, .turn:last-child [aria-label='Regenerate answer']")
    page.until(lambda: page.answers == ["Hello.", "Again."])
    page.settled()
    contents = [message["content"] for message in mortal.get(f"/v1/sessions/{page.id}")["messages"]]
    assert contents == ["one", "Hello.", "two", "Again."]
    page.ask("")
    assert page.questions[-1] == "while it is away"


def test_asking_while_the_server_is_away(page: Page, mortal: Served) -> None:
    mortal.says("Hello.")
    page.open(mortal.address)
    page.until(lambda: page.text("#model"))
    mortal.ask("other", "from elsewhere")
    mortal.stop()
    page.ask("one")
    assert "cannot be reached" in page.text(".failed .note")
    page.one("#offline")
    for drawing in ("#send use", ".failed .note use"):
        assert page.js("return document.querySelector(arguments[0]).getBBox().width", drawing) > 0, drawing
    mortal.start()
    page.click("#look-now")
    page.until(lambda: not page.all("#offline:not([hidden])"))
    page.until(lambda: page.texts("#sessions .title") == ["from elsewhere"])
    page.click(".failed .note button")
    page.until(lambda: page.answers == ["Hello."])
    page.settled()
    page.until(lambda: page.texts("#sessions .title") == ["one", "from elsewhere"])
