"""What a model writes, drawn: nothing of it runs, nothing is fetched, and a streamed text looks like the whole one.

But for one test the page's Content-Security-Policy is switched off here, so that DOMPurify stands alone.
"""

from __future__ import annotations

import json
import random

import pytest

from tests.browser.chromium import Page

pytestmark = pytest.mark.browser

HOSTILE = [
    "<script>window.ran = true</script>",
    "Hi <script>window.ran = true</script> there",
    "<img src=x onerror='window.ran = true'>",
    'text <img src=x onerror="window.ran = true"> text',
    "<svg onload='window.ran = true'><script>window.ran = true</script></svg>",
    "<svg><animate onbegin=window.ran=true attributeName=x dur=1s></svg>",
    '<iframe srcdoc="<script>parent.ran = true</script>"></iframe>',
    "<iframe src='javascript:parent.ran = true'></iframe>",
    "<body onload='window.ran = true'>",
    "<details open ontoggle='window.ran = true'><summary>x</summary></details>",
    "<input autofocus onfocus='window.ran = true'>",
    "<a href='javascript:window.ran = true'>x</a>",
    "<form action='javascript:window.ran = true'><button>x</button></form>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=x onerror=window.ran=true&gt;">',
    '<noscript><p title="</noscript><img src=x onerror=window.ran=true>">',
    "<b onmouseover='window.ran = true'>bold</b>",
    "<style>@import 'http://192.0.2.1/x.css'; body { display: none }</style>",
    "<link rel=stylesheet href='http://192.0.2.1/x.css'>",
    "<base href='http://192.0.2.1/'>",
    "<meta http-equiv=refresh content='0; url=http://192.0.2.1/'>",
    "<object data='data:text/html,<script>parent.ran = true</script>'></object>",
    "[x](javascript:window.ran=true)",
    "[x](JaVaScRiPt:window.ran=true)",
    "[x](java&#115;cript:window.ran=true)",
    "[x](&#x6A;avascript:window.ran=true)",
    "[x](\x01javascript:window.ran=true)",
    "[x](data:text/html;base64,PHNjcmlwdD53aW5kb3cucmFuPXRydWU8L3NjcmlwdD4=)",
    "[x](vbscript:x)",
    "[x](/v1/sessions)",
    "<javascript:window.ran=true>",
    "![x](http://192.0.2.1/x.png)",
    "![x](javascript:window.ran=true)",
    '![x" onerror="window.ran=true](x)',
    '!["><img src=x onerror=window.ran=true>]("><img src=x onerror=window.ran=true>)',
    '[x](http://a.example/"onmouseover="window.ran=true)',
    "[x](http://a.example 'title\" onmouseover=\"window.ran=true')",
    "[a]: javascript:window.ran=true\n\n[a]",
    '```html" onmouseover="window.ran=true\nx\n```',
    "```<img src=x onerror=window.ran=true>\n<script>window.ran = true</script>\n```",
    "`<script>window.ran = true</script>`",
    "| <img src=x onerror=window.ran=true> |\n|---|\n| <script>window.ran = true</script> |",
    "# <img src=x onerror=window.ran=true>",
    "- <svg/onload=window.ran=true>",
    "<b><p id=prompt name=prompt>clobbered</p></b>",
    "&lt;script&gt;window.ran = true&lt;/script&gt;",
    "<<script>script>window.ran = true<</script>/script>",
    "<a id=x tabindex=1 style='position:fixed;inset:0' href='https://a.example'>over everything</a>",
]
DOCUMENTS = [
    "Hello.\n\nA second paragraph\nof two lines.",
    "# One\n\nText\n===\n\nText\n---\n\n## Two ##\ntext",
    "- a\n- b\n\n- c\n\n  more of c\n\n      code of c\n\nafter",
    "1. a\n\n2. b\n\n10. c\n\n* d\n\n+ e\n\nf",
    "1. a\n2. b\n   - x\n   - y\n\n     z\n3. c\n\ntext\n\n3. d\n4. e",
    "```python\ndef f():\n\n\n    return 1\n```\nafter\n\n~~~\ntilde\n~~~\n\n    indented\n\n    more\n\nend",
    "| a | b |\n|:-:|--:|\n| 1 | 2 |\n| 3 | `|` |\n\n| not a table |\n\ntext",
    "> a\n> b\n\n> c\n>\n> - d\n\nx",
    "a **bold *both* bold** `code` ~~gone~~ <b>b</b> <br> https://a.example x@y.example [l](https://a.example)",
    "- [ ] open\n- [x] done\n\n***\n\n---\ntext  \nbroken\\\nlines",
    "**never closed, *nor this, `nor that, [nor](this",
    "<div>\n\ntext *in* html\n\n</div>\n\n<details><summary>s</summary>x</details>\n\nend",
    "中文 **粗体** 🦙\n\n- 一\n- 二\n\n\tTab\n\nA\r\nB\r\n\r\nC\rD",
    "```\nnever closed\n\n# no heading\n\n- no list",
]


@pytest.fixture
def bare(page: Page) -> Page:
    """The page without its Content-Security-Policy."""
    page.chrome.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
    return page


def draw(page: Page, script: str, *arguments: object) -> list[str]:
    """What is wrong with `shown`, an element on the page, after a script that gets it and the module `markdown`."""
    setup = (
        'const markdown = await import("/markdown.js"); document.querySelector("#planted")?.remove();'
        'const shown = document.createElement("div"); shown.id = "planted"; shown.className = "markdown";'
        "document.body.append(shown); window.ran = undefined;"
    )
    page.await_js(f"{setup} {script}", *arguments)
    page.await_js("await new Promise((done) => setTimeout(done, 60));")  # what was to run has run
    assert page.js("return window.ran ?? null") is None, arguments
    return page.script("structure.js")


def test_hostile_text_neither_runs_nor_leaves_anything_but_plain_elements(page: Page, bare: Page, address: str) -> None:
    page.open(address)
    for text in HOSTILE:
        assert draw(page, "shown.append(markdown.rendered(given[0]));", text) == [], text
        stream = (
            "const stream = new markdown.StreamedMarkdown(shown);"
            "for (const piece of given[0]) { stream.append(piece); stream.finish(); }"
        )
        assert draw(page, stream, text) == [], text
    assert page.text("#prompt") == "" and page.js("return document.querySelectorAll('#prompt').length") == 1


def test_hostile_html_does_not_pass_the_sanitiser_alone(page: Page, bare: Page, address: str) -> None:
    page.open(address)
    for text in HOSTILE:
        assert draw(page, "shown.append(markdown.sanitised(given[0]));", text) == [], text


def test_this_would_be_seen_if_it_ran(page: Page, bare: Page, address: str) -> None:
    page.open(address)
    with pytest.raises(AssertionError):
        draw(page, "shown.innerHTML = given[0];", HOSTILE[2])
    page.js("document.querySelector('#planted').remove(); window.ran = undefined;")
    assert draw(page, "shown.innerHTML = given[0];", "<b style='color: red' onclick='1'>x</b>") != []


def test_the_policy_stops_what_would_pass_the_sanitiser(page: Page, address: str) -> None:
    page.chrome.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})
    page.open(address)
    plant = (
        "document.body.insertAdjacentHTML('beforeend', given[0]); await new Promise((done) => setTimeout(done, 200));"
    )
    for text in (
        "<img src=x onerror='window.ran = true'>",
        "<iframe srcdoc='<script>parent.ran = true</script>'></iframe>",
    ):
        page.await_js(f"try {{ {plant} }} catch (error) {{ if (!(error instanceof TypeError)) throw error; }}", text)
    page.js(
        "const one = document.createElement('script');"
        "try { one.text = 'window.ran = true' } catch {} document.body.append(one)"
    )
    assert page.js("return window.ran ?? null") is None
    page.chrome.get_log("browser")  # which tells of all this


def test_nothing_is_fetched_from_elsewhere(page: Page, bare: Page, address: str) -> None:
    page.open(address)
    page.chrome.get_log("performance")
    for text in HOSTILE:
        draw(page, "shown.append(markdown.rendered(given[0]));", text)
    events = [json.loads(entry["message"])["message"] for entry in page.chrome.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith(address)} == set()
    assert not [url for url in asked if url.endswith(("/x", "x.png", "/v1/sessions"))]


def test_a_streamed_text_looks_like_the_whole_one(page: Page, address: str) -> None:
    page.open(address)
    rng = random.Random(0)
    script = """
        const stream = new markdown.StreamedMarkdown(shown);
        for (const piece of given[1]) { stream.append(piece); if (given[2]) stream.finish(); }
        stream.finish();
        const whole = document.createElement("div");
        whole.append(markdown.rendered(given[0]));
        const html = (element) => element.innerHTML.replace(/>\\s+</g, "><").trim();
        if (html(shown) !== html(whole)) throw new Error(`${html(shown)}\\n  is not\\n${html(whole)}`);
    """
    for document in (*DOCUMENTS, "\n\n".join(DOCUMENTS)):
        for _ in range(4):
            cuts = sorted(rng.sample(range(len(document)), k=min(len(document) - 1, rng.randint(1, 60))))
            pieces = [document[i:j] for i, j in zip([0, *cuts], [*cuts, len(document)], strict=True)]
            draw(page, script, document, pieces, rng.random() < 0.7)


def test_elements_that_people_expect(page: Page, address: str) -> None:
    page.open(address)
    draw(page, "shown.append(markdown.rendered(given[0]));", "\n\n".join(DOCUMENTS))
    for selector in (
        "h1", "h2", "ul ul, ol ul", "ol[start='3']", "pre > code.language-python", "td[align=right]", "blockquote ul",
        "strong em", "del", "b", "a[href='https://a.example']", "input[type=checkbox][checked]:disabled", "hr", "br",
        ".code button[aria-label='Copy code']",
    ):  # fmt: skip
        assert page.all(f"#planted {selector}"), selector
    draw(page, "shown.append(markdown.rendered(given[0]));", "a <i>b</i>\n<div onclick=x>shown</div>")
    assert "<div onclick=x>shown</div>" in page.text("#planted")


def test_a_huge_code_block_is_drawn_while_it_grows(page: Page, address: str) -> None:
    page.open(address)
    line = "const answer = compute(42); // <b>&amp;</b>\n"
    script = """
        const stream = new markdown.StreamedMarkdown(shown);
        stream.append("Before.\\n\\n```js\\n");
        const end = performance.now() + 20000;
        for (let i = 0; i < 5000 && performance.now() < end; i++) {
            stream.append(given[0]);
            if (i % 50 === 0) await new Promise((done) => setTimeout(done));
        }
        stream.append("```\\n");
        stream.finish();
        return null;
    """
    begun = page.js("return performance.now()")
    assert draw(page, script, line) == []
    assert page.js("return performance.now()") - begun < 15_000
    assert page.js("return document.querySelector('#planted code').textContent") == line * 5000
