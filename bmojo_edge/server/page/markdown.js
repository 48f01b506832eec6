// Markdown to elements. What a model writes is hostile until shown otherwise: HTML in it is shown as text, and whatever
// the Markdown parser makes passes DOMPurify, which knows the few tags and attributes below and no others.

import { copyButton, h } from "./dom.js";
import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const TAGS = (
  "p br hr h1 h2 h3 h4 h5 h6 strong b em i u s del mark sub sup kbd code pre blockquote ul ol li " +
  "table thead tbody tr th td a input"
).split(" ");
const ATTRIBUTES = ["href", "title", "align", "start", "type", "checked", "disabled", "class"];
const PLAIN_TAG = /^<(\/?(b|i|u|s|mark|sub|sup|kbd)|br ?\/?)>$/i; // that models do write, and mean
const LANGUAGE = /^language-([\w+#.-]{1,30})$/;
const LINK = /^(https?|mailto):/i;

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => {
      if (PLAIN_TAG.test(text.trim())) return text;
      return block ? `<pre><code class="language-html">${escaped(text)}</code></pre>` : escaped(text);
    },
    // Pictures would be fetched from wherever the model says: they become links.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
  },
});

function escaped(text) {
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (character) => entities[character]);
}

/** A fragment without scripts, styles, forms or anything that is fetched. */
export function sanitised(html) {
  const fragment = DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOWED_URI_REGEXP: LINK,
    ADD_URI_SAFE_ATTR: ["align", "start", "type", "checked", "disabled"], // whose values are no addresses
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  for (const element of fragment.querySelectorAll("[class]")) {
    if (!element.matches("pre > code") || !LANGUAGE.test(element.className)) element.removeAttribute("class");
  }
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) link.replaceWith(...link.childNodes); // it went somewhere that is not allowed
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
  }
  for (const input of fragment.querySelectorAll("input")) {
    if (input.type !== "checkbox") input.remove();
    input.disabled = true; // the boxes of task lists
  }
  return fragment;
}

/** A Markdown text as a fragment, code blocks with a head and a copy button. */
export function rendered(text) {
  return drawn(marked.lexer(text));
}

function drawn(blocks) {
  const fragment = sanitised(marked.parser(blocks));
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const language = LANGUAGE.exec(pre.querySelector("code")?.className ?? "")?.[1] ?? "";
    const head = h("div", { class: "code-head" }, h("span", {}, language));
    head.append(copyButton("Copy code", () => pre.textContent.replace(/\n$/, "")));
    const frame = h("div", { class: "code" }, head);
    pre.replaceWith(frame);
    pre.tabIndex = 0; // it scrolls
    frame.append(pre);
  }
  return fragment;
}

/** Draws a text that is still being written: blocks that can no longer change are drawn once. */
export class StreamedMarkdown {
  #element;
  #open = []; // nodes of the blocks that may change
  #tail = "";
  #timer = null;
  #cost = 0; // milliseconds of the last drawing

  constructor(element) {
    this.#element = element;
  }

  /** Adds a piece, and draws soon: the longer a drawing takes, the later. */
  append(piece) {
    this.#tail += piece;
    this.#timer ??= setTimeout(() => this.#draw(), Math.max(16, 4 * this.#cost));
  }

  /** Draws what is there now. */
  finish() {
    clearTimeout(this.#timer);
    this.#draw();
  }

  #draw() {
    const begun = performance.now();
    this.#timer = null;
    this.#tail = this.#tail.replace(/\r\n|\r(?!\n|$)/g, "\n"); // as the lexer does, so that lengths agree
    const blocks = marked.lexer(this.#tail);
    const written = blocks.flatMap((block, i) => (block.type === "space" ? [] : [i]));
    const first = written.at(-2) ?? 0; // the last two may change: a blank line can join them
    for (const node of this.#open) node.remove();
    if (first > 0) {
      const settled = blocks.slice(0, first);
      this.#element.append(drawn(settled));
      this.#tail = this.#tail.slice(settled.reduce((length, block) => length + block.raw.length, 0));
    }
    const rest = drawn(blocks.slice(first));
    this.#open = [...rest.childNodes];
    this.#element.append(rest);
    this.#cost = performance.now() - begun;
  }
}
