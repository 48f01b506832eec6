// The list of conversations: find, open, rename, delete.

import { h, iconButton } from "./dom.js";

export class SessionList {
  #api;
  #on;
  #list = document.getElementById("sessions");
  #filter = document.getElementById("find");
  #sessions = [];
  #renaming = null;
  #marks = { current: null, answering: new Set() };

  /** `on`: failed(error), deleting(id), deleted(id), renamed(session). */
  constructor(api, on) {
    this.#api = api;
    this.#on = on;
    this.#filter.addEventListener("input", () => this.#draw());
    this.#filter.addEventListener("keydown", (event) => this.#keyInFilter(event));
    this.#list.addEventListener("keydown", (event) => this.#keyInList(event));
  }

  /** Asks the server. Raises ApiError and Unreachable. */
  async refresh() {
    this.#sessions = (await this.#api.call("GET", "v1/sessions")).data;
    this.#draw();
  }

  /** What the server told last of a conversation; null where it did not. */
  about(id) {
    return this.#sessions.find((session) => session.id === id) ?? null;
  }

  /** Marks the conversation that is shown, and those that are being answered. */
  mark(current, answering) {
    this.#marks = { current, answering };
    this.#draw();
  }

  #draw() {
    if (this.#renaming !== null) return;
    const wanted = this.#filter.value.trim().toLowerCase();
    const found = this.#sessions.filter(({ title }) => (title ?? "").toLowerCase().includes(wanted));
    const focused = this.#list.contains(document.activeElement)
      ? document.activeElement.closest("li")?.dataset.id
      : null;
    this.#list.replaceChildren(...found.map((session) => this.#item(session)));
    if (focused) this.#list.querySelector(`li[data-id="${focused}"] a`)?.focus();
    const none = document.getElementById("no-sessions");
    none.hidden = found.length > 0;
    none.textContent = wanted ? "No conversation has this in its title." : "No conversations yet.";
  }

  #item(session) {
    const current = session.id === this.#marks.current;
    const answering = this.#marks.answering.has(session.id);
    const title = h("span", { class: "title" }, session.title || "Untitled");
    const about = `${ago(session.updated)} · ${session.position.toLocaleString("en")} tokens`;
    const link = h(
      "a",
      { href: `#${session.id}`, "aria-current": current ? "page" : null },
      title,
      h("small", {}, answering ? "answering…" : about),
    );
    const rename = iconButton("edit", "Rename", () => this.#rename(session));
    const remove = iconButton("trash", "Delete", () => this.#delete(session));
    return h("li", { "data-id": session.id, class: answering ? "answering" : null }, link, rename, remove);
  }

  #rename(session) {
    this.#renaming = session.id;
    const input = h("input", { type: "text", "aria-label": "Title", maxlength: "200", value: session.title ?? "" });
    const item = this.#list.querySelector(`li[data-id="${session.id}"]`);
    const end = async (save) => {
      if (this.#renaming !== session.id) return;
      this.#renaming = null;
      const title = input.value.trim();
      if (save && title && title !== session.title) {
        try {
          Object.assign(session, await this.#api.call("PATCH", `v1/sessions/${session.id}`, { title }));
          this.#on.renamed(session);
        } catch (error) {
          this.#on.failed(error);
        }
      }
      this.#draw();
      this.#list.querySelector(`li[data-id="${session.id}"] a`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(true);
      else if (event.key === "Escape") end(false);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    input.addEventListener("blur", () => end(true));
    item.replaceChildren(input);
    input.select();
  }

  #delete(session) {
    const dialog = document.getElementById("delete");
    document.getElementById("delete-title").textContent = session.title || "Untitled";
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      async () => {
        if (dialog.returnValue !== "delete") return;
        this.#on.deleting(session.id);
        try {
          await this.#api.call("DELETE", `v1/sessions/${session.id}`);
        } catch (error) {
          if (error.status !== 404) return this.#on.failed(error);
        }
        this.#sessions = this.#sessions.filter(({ id }) => id !== session.id);
        this.#draw();
        this.#on.deleted(session.id);
      },
      { once: true },
    );
    dialog.showModal();
  }

  #keyInFilter(event) {
    const first = this.#list.querySelector("a");
    if (event.key === "ArrowDown") first?.focus();
    else if (event.key === "Enter") first?.click();
    else return;
    event.preventDefault();
  }

  #keyInList(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step === undefined || event.target.tagName !== "A") return;
    event.preventDefault();
    const links = [...this.#list.querySelectorAll("a")];
    const next = links[links.indexOf(event.target) + step];
    (next ?? (step < 0 ? this.#filter : event.target)).focus();
  }
}

function ago(seconds) {
  const past = Date.now() / 1000 - seconds;
  const format = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  if (past < 60) return "now";
  if (past < 3600) return format.format(-Math.round(past / 60), "minute");
  if (past < 86400) return format.format(-Math.round(past / 3600), "hour");
  if (past < 30 * 86400) return format.format(-Math.round(past / 86400), "day");
  return new Date(seconds * 1000).toLocaleDateString("en", { dateStyle: "medium" });
}
