"""The chat page in Chromium: conversations, their list, keys, themes and sizes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.chromium import PHONE, Page
from tests.browser.serving import Served

pytestmark = pytest.mark.browser

LONG = "The river runs to the sea. " * 40


@pytest.fixture
def chat(page: Page, served: Served) -> Page:
    """The page with an empty conversation, on a server that says "Hello." at once."""
    served.says("Hello.")
    return page.open(served.address)


def messages(served: Served, page: Page) -> list[str]:
    return [message["content"] for message in served.get(f"/v1/sessions/{page.id}")["messages"]]


# --- a conversation


def test_an_answer_appears_as_it_is_said(chat: Page, served: Served) -> None:
    served.says(LONG, pause=0.02)
    chat.ask("Tell me", wait=False)
    lengths = []
    while chat.all(".turn.answering"):
        lengths.append(len(chat.text(".answer .markdown")))
        time.sleep(0.05)
    assert len({length for length in lengths if 0 < length < len(LONG) - 30}) >= 5
    assert lengths == sorted(lengths)
    assert chat.answers == [LONG.strip()]
    assert messages(served, chat) == ["Tell me", LONG] or messages(served, chat) == ["Tell me", LONG.strip()]
    assert chat.text("h1") == "Tell me"


@pytest.mark.parametrize("how", ["button", "key"])
def test_a_stopped_answer_keeps_what_was_said(chat: Page, served: Served, how: str) -> None:
    served.says(LONG, pause=0.05)
    chat.ask("Tell me", wait=False)
    chat.until(lambda: len(chat.text(".answer .markdown")) > 20)
    if how == "button":
        chat.click("#send[aria-label^='Stop']")
    else:
        chat.press(Keys.ESCAPE)
    chat.settled()
    (partial,) = chat.answers
    assert 20 < len(partial) < len(LONG) - 30 and LONG.startswith(partial)
    assert chat.text(".answer .note") == "Stopped."
    assert messages(served, chat)[1].strip() == partial
    served.says("And on.")
    chat.ask("Go on")
    assert chat.answers == [partial, "And on."]
    chat.chrome.refresh()
    chat.until(lambda: chat.answers == [partial, "And on."])


def test_editing_a_question_takes_back_what_followed(chat: Page, served: Served) -> None:
    for question in ("one", "two", "three"):
        chat.ask(question)
    first = chat.id
    chat.js("document.querySelectorAll('[aria-label=\"Edit question\"]')[1].click()")
    editor = chat.one(".editor textarea")
    assert "takes back 1 later turn." in chat.text(".editor")
    served.says("Changed.")
    editor.send_keys(Keys.CONTROL + "a" + Keys.NULL, "deux", Keys.ENTER)
    chat.until(lambda: chat.questions == ["one", "deux"])
    chat.settled()
    assert chat.answers == ["Hello.", "Changed."]
    assert messages(served, chat) == ["one", "Hello.", "deux", "Changed."]
    assert chat.id == first


def test_up_edits_the_last_question_and_escape_leaves_it(chat: Page, served: Served) -> None:
    chat.ask("one")
    chat.one("#prompt").send_keys(Keys.ARROW_UP)
    editor = chat.one(".editor textarea")
    assert editor == chat.chrome.switch_to.active_element
    editor.send_keys(" more", Keys.ESCAPE)
    assert chat.questions == ["one"]
    assert chat.one("#prompt") == chat.chrome.switch_to.active_element
    assert messages(served, chat) == ["one", "Hello."]
    chat.one("#prompt").send_keys("text", Keys.ARROW_UP)
    assert not chat.all(".editor")


def test_regenerating_asks_the_same_again(chat: Page, served: Served) -> None:
    chat.ask("one")
    chat.ask("two")
    served.says("Another.")
    chat.click(".turn:last-child [aria-label='Regenerate answer']")
    chat.until(lambda: chat.answers == ["Hello.", "Another."])
    chat.settled()
    assert messages(served, chat) == ["one", "Hello.", "two", "Another."]


def test_a_fork_has_the_same_past_and_its_own_future(chat: Page, served: Served) -> None:
    for question in ("one", "two"):
        chat.ask(question)
    trunk = chat.id
    chat.click("[aria-label^='Fork']")
    chat.until(lambda: chat.id != trunk and chat.questions == ["one"])
    chat.ask("instead")
    assert messages(served, chat) == ["one", "Hello.", "instead", "Hello."]
    chat.chrome.back()
    chat.until(lambda: chat.id == trunk and chat.questions == ["one", "two"])
    assert messages(served, chat) == ["one", "Hello.", "two", "Hello."]


def test_another_conversation_while_one_is_answered(chat: Page, served: Served) -> None:
    served.says(LONG, pause=0.02)
    chat.ask("slow", wait=False)
    slow = chat.id
    chat.until(lambda: chat.all(f"#sessions li[data-id='{slow}'], #new"))
    chat.click("#new")
    assert chat.questions == []
    chat.until(lambda: len(served.get(f"/v1/sessions/{slow}")["messages"]) == 2)
    chat.until(lambda: chat.all(f"#sessions li[data-id='{slow}']:not(.answering)"))
    chat.click(f"#sessions li[data-id='{slow}'] a")
    chat.until(lambda: chat.answers == [LONG.strip()])


def test_a_conversation_in_use_elsewhere_is_waited_for(chat: Page, served: Served) -> None:
    chat.ask("one")
    served.says(LONG, pause=0.05)
    with ThreadPoolExecutor() as elsewhere:
        asked = elsewhere.submit(served.ask, chat.id, "from elsewhere")
        chat.until(lambda: served.get("/health")["running"] == 1)
        chat.ask("two", wait=False)
        chat.until(lambda: "Waiting" in chat.text(".turn:last-child .note"))
        served.says("Hello.")  # which ends the other answer, too
        asked.result()
    chat.settled()
    chat.until(lambda: chat.questions == ["one", "from elsewhere", "two"])
    assert chat.answers[-1] == "Hello." and chat.text(".turn:last-child .note") == ""
    served.ask(chat.id, "again from elsewhere")
    chat.js("document.dispatchEvent(new Event('visibilitychange'))")
    chat.until(lambda: chat.questions[-1] == "again from elsewhere")


def test_instructions_are_sent_once_and_shown(chat: Page, served: Served) -> None:
    chat.click("#open-settings")
    chat.one("#settings textarea").send_keys("Be brief.")
    chat.click("#settings button[value=save]")
    chat.ask("one")
    chat.ask("two")
    assert messages(served, chat) == ["Be brief.", "one", "Hello.", "two", "Hello."]
    chat.chrome.refresh()
    chat.until(lambda: chat.questions == ["one", "two"])
    assert chat.texts(".system summary") == ["Instructions"]


def test_a_refused_question_can_be_asked_again(chat: Page, served: Served) -> None:
    chat.click("#open-settings")
    chat.one("#settings [name=max_tokens]").send_keys("999999")
    chat.click("#settings button[value=save]")
    chat.ask("one")
    assert "at most" in chat.text(".failed .note") and "999,999" in chat.text(".failed .note")
    chat.click("#open-settings")
    chat.one("#settings [name=max_tokens]").clear()
    chat.click("#settings button[value=save]")
    chat.click(".failed .note button")
    chat.until(lambda: chat.answers == ["Hello."])
    chat.settled()
    assert messages(served, chat) == ["one", "Hello."]


def test_text_is_shown_as_it_was_typed(chat: Page, served: Served) -> None:
    chat.one("#prompt").send_keys("<b>a</b>", Keys.SHIFT + Keys.ENTER, Keys.NULL, "  *b*")
    chat.one("#prompt").send_keys(Keys.ENTER)
    chat.until(lambda: chat.answers == ["Hello."])
    chat.settled()
    assert chat.questions == ["<b>a</b>\n  *b*"]
    assert messages(served, chat)[0] == "<b>a</b>\n  *b*"
    chat.one("#prompt").send_keys("   ", Keys.ENTER)
    assert len(chat.questions) == 1


def test_code_is_copied(chat: Page, served: Served) -> None:
    chat.chrome.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    served.says("See:\n\n```python\nprint('<&>')\n\nprint(2)\n```\n")
    chat.ask("code")
    chat.click(".code [aria-label='Copy code']")
    chat.until(lambda: chat.text("#announcer") == "Copied.")
    assert chat.await_js("return navigator.clipboard.readText();") == "print('<&>')\n\nprint(2)"


# --- the list


def test_the_list_finds_renames_and_deletes(chat: Page, served: Served) -> None:
    ids = []
    for question in ("about rivers", "about hills"):
        chat.click("#new")
        chat.ask(question)
        ids.append(chat.id)
    chat.until(lambda: chat.texts("#sessions .title")[:2] == ["about hills", "about rivers"])
    chat.one("#find").send_keys("RIVER")
    chat.until(lambda: chat.texts("#sessions .title") == ["about rivers"])
    chat.one("#find").send_keys(Keys.ENTER)
    chat.until(lambda: chat.id == ids[0] and chat.questions == ["about rivers"])
    chat.one("#find").clear()
    chat.one("#find").send_keys(" ", Keys.BACKSPACE)

    chat.click(f"#sessions li[data-id='{ids[0]}'] [aria-label=Rename]")
    name = chat.one("#sessions input")
    name.send_keys(Keys.CONTROL + "a" + Keys.NULL, "<i>Water</i>", Keys.ENTER)
    chat.until(lambda: "<i>Water</i>" in chat.texts("#sessions .title"))
    assert chat.text("h1") == "<i>Water</i>"
    assert served.get(f"/v1/sessions/{ids[0]}")["title"] == "<i>Water</i>"

    chat.click(f"#sessions li[data-id='{ids[0]}'] [aria-label=Delete]")
    assert "<i>Water</i>" in chat.one("#delete").text
    chat.press(Keys.ESCAPE)
    assert served.get(f"/v1/sessions/{ids[0]}")["id"] == ids[0]
    chat.click(f"#sessions li[data-id='{ids[0]}'] [aria-label=Delete]")
    chat.one("#delete button[value=delete]").click()
    chat.until(lambda: "<i>Water</i>" not in chat.texts("#sessions .title"))
    assert "error" in served.get(f"/v1/sessions/{ids[0]}")
    assert chat.questions == [] and chat.id == ""
    assert "about hills" in chat.texts("#sessions .title")


def test_deleting_a_conversation_while_it_is_answered(chat: Page, served: Served) -> None:
    served.says(LONG, pause=0.05)
    chat.ask("about to go", wait=False)
    gone = chat.id
    chat.until(lambda: len(chat.text(".answer .markdown")) > 20)
    chat.js("document.dispatchEvent(new Event('visibilitychange'))")  # the list is asked for
    chat.click(f"#sessions li[data-id='{gone}'] [aria-label=Delete]")
    chat.one("#delete button[value=delete]").click()
    chat.until(lambda: "error" in served.get(f"/v1/sessions/{gone}"))
    chat.until(lambda: chat.questions == [] and "about to go" not in chat.texts("#sessions .title"))
    served.says("Hello.")
    chat.ask("another")
    assert chat.answers == ["Hello."]


def test_an_address_that_is_no_longer_there(chat: Page, served: Served) -> None:
    chat.open("about:blank").open(f"{served.address}/#gone")
    chat.until(lambda: "not on the server any more" in chat.text("#notice"))
    chat.ask("still works")
    assert chat.answers == ["Hello."]


# --- keys, themes, sizes


def test_keys(chat: Page) -> None:
    chat.ask("one")
    chat.press(Keys.CONTROL, "k")
    assert chat.one("#find") == chat.chrome.switch_to.active_element
    chat.press(Keys.ARROW_DOWN)
    assert chat.chrome.switch_to.active_element.tag_name == "a"
    chat.press(Keys.CONTROL, Keys.SHIFT, "o")
    chat.until(lambda: chat.questions == [])
    assert chat.one("#prompt") == chat.chrome.switch_to.active_element
    chat.chrome.back()
    chat.until(lambda: chat.questions == ["one"])
    chat.press(Keys.ALT, "m")
    assert chat.one("#memory")
    chat.press(Keys.ESCAPE)
    assert not chat.all("#memory:not([hidden])")


def test_light_and_dark(chat: Page) -> None:
    def ground() -> str:
        return chat.js("return getComputedStyle(document.body).backgroundColor")

    light, dark = "rgb(255, 255, 255)", "rgb(22, 24, 29)"
    assert ground() == light
    chat.prefers("dark")
    assert ground() == dark
    chat.click("#theme")
    assert ground() == light
    chat.chrome.refresh()
    assert ground() == light
    chat.click("#theme")
    assert ground() == dark
    chat.prefers("light")
    assert ground() == light, "the system's theme holds again"


def test_a_phone(chat: Page, served: Served) -> None:
    chat.size(*PHONE, touch=True)
    served.says(
        "```\n" + "wide " * 60 + "\n```\n\n| " + " | ".join(["head"] * 20) + " |\n|" + "---|" * 20 + "\n\n" + "x" * 300
    )
    chat.one("#prompt").send_keys("w" * 200, Keys.ENTER, "more")
    assert chat.questions == [], "Enter is the way to a new line there"
    chat.one("#send").click()
    chat.until(lambda: chat.answers)
    chat.settled()
    for part in ("html", "#log", "main"):
        width, room = chat.js(
            "const e = document.querySelector(arguments[0]); return [e.scrollWidth, e.clientWidth]", part
        )
        assert width <= room <= PHONE[0], part
    assert not chat.all("#sidebar:not([inert])")
    chat.click("#menu")
    chat.until(lambda: chat.one("#new").rect["x"] > 0)
    chat.click("#scrim")
    chat.until(lambda: chat.js("return document.querySelector('#new').getBoundingClientRect().right") <= 0)
    chat.click("#menu")
    chat.press(Keys.ESCAPE)
    assert not chat.all("#sidebar:not([inert])")
    chat.click("#meter")
    assert chat.one("#memory").rect["width"] == PHONE[0]
    chat.click("#close-memory")
    small = chat.js("""
        return [...document.querySelectorAll("main button")].filter((one) => one.checkVisibility())
            .map((one) => [one.getAttribute("aria-label"), one.getBoundingClientRect()])
            .filter(([, box]) => box.width < 32 || box.height < 32).map(([name]) => name)""")
    assert small == []


def test_the_end_stays_in_sight_until_the_user_scrolls_up(chat: Page, served: Served) -> None:
    chat.size(1000, 420)
    served.says("\n\n".join(["A paragraph of the answer."] * 30), pause=0.003)
    chat.ask("long", wait=False)
    far = "const log = document.getElementById('log'); return log.scrollHeight - log.clientHeight - log.scrollTop"
    chat.until(lambda: chat.js("return document.getElementById('log').scrollTop") > 200)
    assert chat.js(far) < 60
    assert not chat.all("#jump:not([hidden])")
    chat.js("document.getElementById('log').scrollTop -= 150")
    chat.one("#jump")
    place = chat.js("return document.getElementById('log').scrollTop")
    length = len(chat.text(".answer .markdown"))
    chat.until(lambda: len(chat.text(".answer .markdown")) > length + 100)
    assert chat.js("return document.getElementById('log').scrollTop") == place
    chat.click("#jump")
    chat.until(lambda: chat.js(far) < 60)
    chat.settled()
    chat.until(lambda: chat.js(far) < 60)


def test_everything_has_a_name_and_text_has_contrast(chat: Page, served: Served) -> None:
    served.says("`code` and [a link](https://a.example)\n\n```python\nx\n```\n\n> quoted\n\n| a |\n|---|\n| b |")
    chat.ask("one")
    chat.click("#meter")
    chat.until(lambda: chat.all("#memory .layers"))
    nodes = chat.chrome.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {
        "button",
        "link",
        "textbox",
        "searchbox",
        "spinbutton",
        "navigation",
        "complementary",
        "log",
        "dialog",
        "image",
    }
    for node in nodes:
        if not node["ignored"] and node["role"]["value"] in named:
            assert node["name"]["value"].strip(), node
    for scheme in ("light", "dark"):
        chat.prefers(scheme)
        assert chat.script("contrast.js") == [], scheme


# --- long conversations


def test_a_long_conversation_opens_and_grows_fast(chat: Page, served: Served) -> None:
    answer = "**Yes**, `code`:\n\n```python\nprint(1)\n```\n\n- a\n- b\n"
    served.says(answer)
    chat.ask("0")
    begun = time.monotonic()
    chat.ask("1")
    short = time.monotonic() - begun
    add = """
        const { Turn } = await import("/turn.js");
        const begun = performance.now();
        const shown = document.querySelector(".conversation");
        for (let i = 0; i < 1000; i++) {
          const turn = new Turn(`question ${i}`, {});
          turn.show(given[0] + "\\n\\n" + "Some words of text. ".repeat(40));
          shown.append(turn.element);
        }
        shown.getBoundingClientRect();
        return performance.now() - begun;
    """
    assert chat.await_js(add, answer) < 10_000
    begun = time.monotonic()
    chat.ask("the next one")
    assert time.monotonic() - begun < 2 + 3 * short
    assert chat.answers[-1].startswith("Yes")
