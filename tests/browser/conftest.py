"""One Chromium for all tests, and a server whose model says what a test wants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium import webdriver

from bmojo_edge.engine import LM
from bmojo_edge.tokenizer import Tokenizer
from tests.browser.chromium import DESKTOP, Page, chromium
from tests.browser.serving import Served
from tests.unit.test_generation_engines import make
from tests.unit.tokenizer_folders import byte_level


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """A tiny model of all memories."""
    return make("mlx", Tokenizer.load(byte_level(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def served(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(lm, tmp_path_factory.mktemp("sessions"))
    yield served
    served.stop()


@pytest.fixture
def address(served: Served) -> str:
    return served.address


@pytest.fixture
def page(chrome: webdriver.Chrome) -> Iterator[Page]:
    """An empty window: no page, nothing stored, and nothing to complain of afterwards."""
    page = Page(chrome)
    page.size(*DESKTOP)
    page.prefers("light")
    chrome.get_log("browser")
    yield page
    assert page.mistakes() == []
    page.js("try { localStorage.clear(); sessionStorage.clear() } catch {}")
    chrome.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})
    chrome.get("about:blank")
