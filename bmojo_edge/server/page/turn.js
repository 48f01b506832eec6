// One exchange on the page: the question, the answer as it grows, what became of it, and what can be done with it.

import { copyButton, h, icon, iconButton } from "./dom.js";
import { StreamedMarkdown, rendered } from "./markdown.js";

export class Turn {
  #actions;
  #question;
  #body = h("div", { class: "markdown" });
  #note = h("p", { class: "note" });
  #tools = h("div", { class: "tools" });
  #stream = null;
  #answer = "";
  #editing = false;
  /** "answering", "done", or "failed": the server does not have it. */
  state = "done";

  /** `actions`: regenerate, fork, edit (with the new text), retry, and turnsAfter, each called with this turn. */
  constructor(user, actions) {
    this.user = user;
    this.#actions = actions;
    this.#question = h("div", { class: "question" });
    const answer = h("div", { class: "answer" }, this.#body, this.#note, this.#tools);
    this.element = h("article", { class: "turn", "aria-label": "Question and answer" }, this.#question, answer);
    this.#drawQuestion();
  }

  get answer() {
    return this.#answer;
  }

  /** Shows an answer that is complete. */
  show(answer) {
    this.#stream = null;
    this.#answer = answer;
    this.#body.replaceChildren(rendered(answer));
    this.#becomes("done");
  }

  /** Empties the answer; pieces will come. */
  begin() {
    this.#answer = "";
    this.#body.replaceChildren();
    this.#stream = new StreamedMarkdown(this.#body);
    this.#becomes("answering");
  }

  append(piece) {
    this.#answer += piece;
    this.#stream.append(piece);
    if (this.element.classList.contains("waiting")) {
      this.element.classList.remove("waiting");
      this.explain("");
    }
  }

  /** Says something below the answer. */
  explain(note) {
    this.#note.replaceChildren(note);
    this.#note.hidden = !note;
  }

  /** The answer is as it stays; `note` tells what cut it short. */
  end(note = "") {
    this.#finish();
    this.#becomes("done", note);
  }

  /** The server does not have this exchange; `message` tells why and what to do. */
  fail(message) {
    this.#finish();
    this.#becomes("failed", message);
    const again = h("button", { type: "button", onclick: () => this.#actions.retry(this) }, icon("redo"), "Try again");
    this.#note.append(" ", again);
  }

  /** Puts the question into an editor. */
  edit() {
    if (this.state === "answering" || this.#editing) return;
    this.#editing = true;
    const area = h("textarea", {
      "aria-label": "Edit the question",
      rows: Math.min(12, this.user.split("\n").length + 1),
    });
    area.value = this.user;
    const close = () => {
      this.#editing = false;
      this.#drawQuestion();
    };
    const send = (event) => {
      event?.preventDefault();
      if (!area.value.trim()) return;
      close();
      this.#actions.edit(this, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
        document.getElementById("prompt").focus();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    });
    const after = this.#actions.turnsAfter(this);
    const lost =
      after > 0 ? h("p", { class: "note" }, `This takes back ${after} later ${after === 1 ? "turn" : "turns"}.`) : null;
    const cancel = h("button", { type: "button", onclick: close }, "Cancel");
    const buttons = h(
      "div",
      { class: "buttons" },
      lost,
      cancel,
      h("button", { type: "submit", class: "primary" }, "Send"),
    );
    this.#question.replaceChildren(h("form", { class: "editor", onsubmit: send }, area, buttons));
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #finish() {
    this.#stream?.finish();
    this.#stream = null;
  }

  #becomes(state, note = "") {
    this.state = state;
    this.element.classList.toggle("answering", state === "answering");
    this.element.classList.toggle("waiting", state === "answering");
    this.element.classList.toggle("failed", state === "failed");
    this.element.setAttribute("aria-busy", String(state === "answering"));
    this.explain(note);
    const done = state === "done";
    this.#tools.replaceChildren(
      ...(this.#answer && state !== "answering" ? [copyButton("Copy answer", () => this.#answer)] : []),
      ...(done
        ? [
            iconButton("redo", "Regenerate answer", () => this.#actions.regenerate(this), {
              class: "icon-button last-only",
            }),
          ]
        : []),
      ...(done
        ? [iconButton("fork", "Fork: go on from here in a new conversation", () => this.#actions.fork(this))]
        : []),
    );
  }

  #drawQuestion() {
    const edit = iconButton("edit", "Edit question", () => this.edit());
    const tools = h(
      "div",
      { class: "tools" },
      edit,
      copyButton("Copy question", () => this.user),
    );
    this.#question.replaceChildren(h("div", { class: "bubble" }, this.user), tools);
  }
}
