// Whether the server is there. When it is not, a line says so, and it is looked for until it comes back.

const FIRST = 500; // milliseconds between looks; each wait is twice the one before
const LONGEST = 8000;

export class Connection {
  #line = document.getElementById("offline");
  #back;
  #timer = null;
  #wait = FIRST;

  /** `back()` is called when the server is there again. */
  constructor(back) {
    this.#back = back;
    document.getElementById("look-now").addEventListener("click", () => this.#look());
    window.addEventListener("online", () => this.#timer !== null && this.#look());
  }

  /** Something failed because the server was not there. */
  lost() {
    if (this.#timer !== null) return;
    this.#line.hidden = false;
    this.#wait = FIRST;
    this.#later();
  }

  #later() {
    this.#timer = setTimeout(() => this.#look(), this.#wait);
    this.#wait = Math.min(LONGEST, 2 * this.#wait);
  }

  async #look() {
    clearTimeout(this.#timer);
    try {
      const response = await fetch("health", { cache: "no-store" });
      if (!response.ok) throw new Error(response.statusText);
    } catch {
      this.#later();
      return;
    }
    this.#timer = null;
    this.#line.hidden = true;
    this.#back();
  }
}
