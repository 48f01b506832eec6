// Where questions are written: Enter sends, Shift+Enter begins a line, and the button stops a running answer.

import { icon } from "./dom.js";

export class Composer {
  #area = document.getElementById("prompt");
  #button = document.getElementById("send");
  #on;
  #answering = false;

  /** `on`: send(text), stop() and editLast(). */
  constructor(on) {
    this.#on = on;
    document.getElementById("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#answering) on.stop();
      else this.#send();
    });
    this.#area.addEventListener("input", () => this.#changed());
    this.#area.addEventListener("keydown", (event) => this.#key(event));
    this.#changed();
  }

  focus() {
    if (matchMedia("(pointer: coarse)").matches) return; // it would bring up a phone's keyboard
    this.#area.focus();
    const end = this.#area.value.length;
    this.#area.setSelectionRange(end, end); // a dialog that was closed by a click gives the focus back, but no caret
  }

  /** While an answer runs the button stops it. */
  set answering(answering) {
    this.#answering = answering;
    this.#button.replaceChildren(icon(answering ? "stop" : "send"));
    const label = answering ? "Stop the answer (Esc)" : "Send (Enter)";
    this.#button.setAttribute("aria-label", label);
    this.#button.title = label;
    this.#changed();
  }

  #send() {
    const text = this.#area.value;
    if (!text.trim() || this.#answering) return;
    this.#area.value = "";
    this.#changed();
    this.#on.send(text);
  }

  #changed() {
    this.#button.disabled = !this.#answering && !this.#area.value.trim();
    this.#area.style.height = "auto"; // grows with its text, up to what the style sheet allows
    this.#area.style.height = `${this.#area.scrollHeight}px`;
  }

  #key(event) {
    if (event.isComposing) return; // Enter belongs to the input method
    const touch = matchMedia("(pointer: coarse)").matches; // where Enter is the only way to a new line
    if (event.key === "Enter" && !event.shiftKey && !touch) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && this.#area.value === "") {
      event.preventDefault();
      this.#on.editLast();
    }
  }
}
