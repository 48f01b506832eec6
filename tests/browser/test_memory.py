"""The meter and the memory panel, against what the server tells."""

from __future__ import annotations

import re
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.chromium import Page
from tests.browser.serving import Served

pytestmark = pytest.mark.browser


@pytest.fixture
def chat(page: Page, served: Served) -> Page:
    served.says("The river runs to the sea, and the sea is wide.")
    page.open(served.address)
    page.ask("Tell me of the river")
    return page


def tokens(page: Page) -> int:
    return int(re.sub(r"\D", "", page.text("#meter .tokens")))


def looked_at(page: Page) -> None:
    page.until(lambda: page.text("#memory .layers") and page.all("#memory-found[aria-busy=false]"))


def told(served: Served, page: Page) -> dict[str, Any]:
    return served.get(f"/v1/sessions/{page.id}/memory")


def test_position_grows_and_bytes_do_not(chat: Page, served: Served) -> None:
    positions, sizes = [tokens(chat)], {chat.text("#meter .bytes")}
    for i in range(3):
        chat.ask(f"And then {i}?")
        session = served.get(f"/v1/sessions/{chat.id}")
        positions.append(tokens(chat))
        sizes.add(chat.text("#meter .bytes"))
        assert positions[-1] == session["position"]
    assert positions == sorted(set(positions)) and positions[0] > 0
    assert len(sizes) == 1
    chat.click("#meter")
    assert chat.text("#position") == f"{positions[-1]:,}"
    assert chat.text("#exact-bytes") == f"{served.get(f'/v1/sessions/{chat.id}')['bytes']:,} bytes"
    lines = chat.js("return [...document.querySelectorAll('#chart polyline')].map((one) => one.getAttribute('points'))")
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    assert len(heights[0]) == 4 and heights[0] == sorted(set(heights[0]), reverse=True), "up is small"
    assert len(set(heights[1])) == 1


def test_the_meter_runs_while_an_answer_is_said(chat: Page, served: Served) -> None:
    before = tokens(chat)
    served.says("The river runs to the sea. " * 20, pause=0.05)
    chat.ask("More", wait=False)
    chat.until(lambda: tokens(chat) > before + 5)
    assert chat.all(".turn.answering")
    chat.press(Keys.ESCAPE)
    chat.settled()


def test_every_kept_token_is_shown_with_where_and_why(chat: Page, served: Served) -> None:
    for i in range(3):
        chat.ask(f"Question {i}, of hills and other things that are far from the river")
    chat.click("#meter")
    looked_at(chat)
    memory = told(served, chat)
    rows = chat.all("#memory .layers button")
    assert len(rows) == len(memory["layers"])
    assert any(layer["eidetic"] for layer in memory["layers"])
    for row, layer in zip(rows, memory["layers"], strict=True):
        if layer["kind"] != "bmojo":
            assert not row.is_enabled()
            continue
        chat.js("arguments[0].click()", row)
        assert row.get_attribute("aria-pressed") == "true"
        labels = chat.js("return [...document.querySelectorAll('#memory .token')].map((one) => one.ariaLabel)")
        shades = chat.js(
            "const chips = [...document.querySelectorAll('#memory .token')];"
            "return chips.map((one) => +one.style.getPropertyValue('--shade'))"
        )
        kept = {token["position"]: token for token in layer["sinks"] + layer["eidetic"]}
        assert len(labels) == len(shades) == len(kept)
        scores = [token["innovation"] for token in layer["eidetic"]]
        for label, shade, position in zip(labels, shades, sorted(kept), strict=True):
            token = kept[position]
            assert f"position {position:,}, {token['age']:,} tokens ago" in label
            assert ("sink" in label) == any(sink["position"] == position for sink in layer["sinks"])
            if token["innovation"] is not None:
                assert float(label.split("innovation ")[1].split(" ")[0]) == pytest.approx(
                    token["innovation"], rel=1e-3
                )
                low, high = min(scores), max(scores)
                assert shade == pytest.approx((token["innovation"] - low) / (high - low), abs=1e-3)


def test_pointer_and_keys_tell_of_a_token(chat: Page) -> None:
    chat.ask("Another question, of hills and other things")
    chat.click("#meter")
    looked_at(chat)
    row = next(row for row in chat.all("#memory .layers button") if re.search(r"[1-9]\d* kept", row.text))
    chat.js("arguments[0].click()", row)
    chips = chat.all("#memory .token")
    chat.js("arguments[0].focus()", chips[0])
    assert chat.text("#token-detail") == chips[0].get_attribute("aria-label")
    chat.press(Keys.ARROW_RIGHT)
    assert chat.chrome.switch_to.active_element == chips[1]
    assert chat.text("#token-detail") == chips[1].get_attribute("aria-label")
    chat.js("arguments[0].dispatchEvent(new PointerEvent('pointerenter'))", chips[2])
    assert chat.text("#token-detail") == chips[2].get_attribute("aria-label")


def test_the_bars_are_as_long_as_the_shares(chat: Page, served: Served) -> None:
    chat.click("#meter")
    looked_at(chat)
    memory = told(served, chat)
    bar = """
        const bar = document.querySelector(arguments[0]), whole = bar.getBoundingClientRect().width;
        const share = (one) => [one.className.split(" ")[1], one.getBoundingClientRect().width / whole];
        return Object.fromEntries([...bar.children].map(share))
    """
    assert memory["queries"] > 0
    for selector, shares in [
        ("#memory-found > section .bar", memory["attention"]),
        *((f".layers button:nth-child({i + 1}) .bar", layer["attention"]) for i, layer in enumerate(memory["layers"])),
    ]:
        got = chat.js(bar, selector)
        for name, share in shares.items():
            assert got.get(name, 0.0) == pytest.approx(share, abs=0.01), selector
    for name, share in memory["attention"].items():
        assert re.search(
            rf"{name} {round(100 * share)}(\.\d)?%|{name} {100 * share:.1f}%",
            chat.text("#memory .legend") + chat.text("#memory-found .legend").replace("\n", " "),
        )


def test_the_panel_follows_the_conversation(chat: Page) -> None:
    chat.click("#meter")
    looked_at(chat)
    first = chat.text("#position")
    chat.ask("And more?")
    looked_at(chat)
    assert int(chat.text("#position").replace(",", "")) > int(first.replace(",", ""))
    chat.click("#new")
    chat.until(lambda: "nothing to remember yet" in chat.text("#memory"))
    chat.press(Keys.ESCAPE)
    chat.until(lambda: not chat.all("#memory:not([hidden])"))


def test_where_looking_is_slow_the_page_asks_first(chat: Page, served: Served) -> None:
    chat.click("#meter")
    looked_at(chat)
    served.says("The river runs to the sea, and the sea is wide.", pause=0.5)
    chat.ask("More")
    chat.until(lambda: chat.text("#position") == chat.text("#meter .tokens").split()[0])
    looked_at(chat)
    served.says("Hello.")
    chat.ask("And more")
    chat.until(lambda: "Looking took" in chat.text("#memory-found"))
    looked_at(chat)
    assert chat.all("#memory .token") and not chat.all("#memory-found .bar")  # what is kept is known at once
    chat.click("#memory-found section:first-child button")
    chat.until(lambda: chat.all("#memory-found .bar"))
    looked_at(chat)
    assert told(served, chat)["position"] == int(chat.text("#position").replace(",", ""))
