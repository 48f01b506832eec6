// One conversation: its turns on the page, and what is asked of the server for them. The server holds the state and the
// transcript; only what is new is sent, and going back is the server's rewind.

import { announce, h } from "./dom.js";
import { ApiError, Unreachable } from "./api.js";
import { Turn } from "./turn.js";

const PATIENCE = 10; // times a quarter of a second, while the server closes an answer
const STOPPED = "Stopped.";

export class Conversation {
  #api;
  #options;
  #on;
  #aborter = null;
  #turns = [];
  #before = 0; // turns of the server's that are not shown: the oldest of a long conversation
  #saved = false; // the server has it
  #there = 0; // turns the server told of last
  #system = null; // the instructions it began with
  /** The element that shows it. */
  element = h("div", { class: "conversation" });
  #title = "";
  position = 0;
  bytes = null;
  /** Tokens of the answer that is being written. */
  said = 0;
  /** Position and bytes after each answer since the page was opened. */
  history = [];

  /**
   * `options()` resolves to model, system and sampling. `on`: change, grown, settled (all of this conversation),
   * forked(session), failed(error) and unreachable.
   */
  constructor(id, api, options, on) {
    this.id = id;
    this.#api = api;
    this.#options = options;
    this.#on = on;
  }

  get answering() {
    return this.#aborter !== null;
  }

  get title() {
    return this.#title || (this.#turns[0]?.user.slice(0, 60) ?? "");
  }

  set title(title) {
    this.#title = title;
  }

  get empty() {
    return this.#turns.length === 0;
  }

  /** How many turns it has as far as the page knows. */
  get turns() {
    return this.#before + this.#turns.length;
  }

  get saved() {
    return this.#saved;
  }

  get last() {
    return this.#turns.at(-1) ?? null;
  }

  get #path() {
    return `v1/sessions/${this.id}`;
  }

  /** Shows what the server has. Raises ApiError (404: no such session) and Unreachable. */
  async load() {
    const session = await this.#api.call("GET", this.#path);
    this.#take(session);
    this.element.replaceChildren();
    this.#turns = [];
    for (const { role, content } of session.messages) {
      if (role === "user") this.#add(content);
      else if (role === "assistant" && this.last) this.last.show(content);
      else if (role === "system") this.#showSystem(content);
    }
    this.#before = session.turns - this.#turns.length;
    if (this.#before > 0) {
      const message = `The first ${this.#before} turns are remembered, but their text is no longer kept.`;
      this.element.prepend(h("p", { class: "note" }, message));
    }
    this.#on.change(this);
  }

  /** Asks something new. */
  async send(text) {
    if (this.answering) return;
    if (this.last?.state === "failed") this.#drop(this.#turns.length - 1);
    await this.#answer(this.#add(text), false);
  }

  /** Ends the answer; what was said so far stays. */
  stop() {
    this.#aborter?.abort();
  }

  /** Answers the last question anew. */
  async regenerate() {
    if (!this.answering && this.last) await this.#answer(this.last, true);
  }

  #add(text) {
    const turn = new Turn(text, {
      regenerate: () => this.regenerate(),
      retry: (failed) => this.answering || this.#answer(failed, true),
      edit: (edited, changed) => this.#edit(edited, changed),
      fork: (forked) => this.#fork(forked),
      turnsAfter: (one) => this.#turns.length - 1 - this.#turns.indexOf(one),
    });
    this.#turns.push(turn);
    this.element.append(turn.element);
    return turn;
  }

  #drop(first) {
    for (const turn of this.#turns.splice(first)) turn.element.remove();
  }

  async #edit(turn, text) {
    if (this.answering) return;
    this.#drop(this.#turns.indexOf(turn));
    await this.#answer(this.#add(text), true);
  }

  async #fork(turn) {
    try {
      const turns = this.#before + this.#turns.indexOf(turn) + 1;
      this.#on.forked(await this.#api.call("POST", `${this.#path}/fork`, { turns }));
    } catch (error) {
      this.#on.failed(error);
    }
  }

  /** Has the last turn answered; `back`: the server may have it, or later ones, already. */
  async #answer(turn, back) {
    const place = this.#before + this.#turns.indexOf(turn); // turns before it
    const aborter = (this.#aborter = new AbortController());
    this.said = 0;
    turn.begin();
    this.#on.change(this);
    announce("Answering.");
    let note = "";
    let failure = null;
    try {
      if (back && this.#saved) await this.#whenFree(turn, aborter.signal, () => this.#rewind(place, aborter.signal));
      const reason = await this.#stream(turn, place, aborter.signal);
      if (reason === "length") note = "The answer reached its limit of tokens.";
    } catch (error) {
      if (error.name === "AbortError") note = STOPPED;
      else failure = error;
    }
    const kept = await this.#settle(place, turn, note, failure);
    if (kept) turn.end(failure ? `Cut off: ${failure.message}` : note);
    else if (note === STOPPED) turn.fail("Stopped before there was an answer.");
    else turn.fail(failure?.message ?? "The server has not kept this answer.");
    this.#aborter = null;
    this.said = 0;
    if (kept && this.#there !== this.turns) await this.load().catch((error) => this.#on.failed(error)); // used elsewhere
    announce(failure ? failure.message : note || "Answer complete.");
    if (failure instanceof Unreachable || failure?.code === "shutting_down") this.#on.unreachable();
    this.#on.change(this);
    this.#on.settled(this);
  }

  async #stream(turn, place, signal) {
    const { model, system, ...sampling } = await this.#options();
    const messages = [{ role: "user", content: turn.user }];
    if (!this.#saved && this.#system === null && system) this.#showSystem(system);
    if (place === 0 && this.#system) messages.unshift({ role: "system", content: this.#system });
    const body = { model, session_id: this.id, messages, ...sampling };
    return this.#whenFree(turn, signal, async () => {
      let reason = null;
      for await (const chunk of this.#api.stream("v1/chat/completions", body, signal)) {
        const choice = chunk.choices[0];
        const piece = choice?.delta.content;
        reason = choice?.finish_reason ?? reason;
        if (!piece) continue;
        turn.append(piece);
        this.said += 1;
        this.#on.grown(this);
      }
      return reason;
    });
  }

  /** What an action returns, once the server no longer uses the conversation for something else. */
  async #whenFree(turn, signal, action) {
    for (;;) {
      try {
        return await action();
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 409) throw error;
        turn.explain("Waiting: another window uses this conversation.");
        await pause(250);
        signal.throwIfAborted();
      }
    }
  }

  async #rewind(place, signal) {
    const session = await this.#api.call("GET", this.#path, undefined, signal);
    if (session.turns < place) {
      throw new ApiError(null, "The server has only an earlier part of this conversation. Reload the page to see it.");
    }
    if (session.turns > place) {
      const body = { turns: session.turns - place };
      this.#take(await this.#api.call("POST", `${this.#path}/rewind`, body, signal));
      this.history = this.history.filter((point) => point.position <= this.position);
    }
  }

  /** Whether the server has a turn that has ended. Reads back an answer that was cut short. */
  async #settle(place, turn, note, failure) {
    const cut = note !== "" || failure !== null;
    const refused = failure instanceof ApiError && failure.status !== null; // then there is nothing to wait for
    for (let tries = refused ? PATIENCE : 0; ; tries++) {
      try {
        const session = await this.#api.call("GET", this.#path);
        const kept = session.turns > place;
        if (!kept && tries < PATIENCE) {
          await pause(250);
          continue;
        }
        this.#take(session);
        this.history.push({ position: this.position, bytes: this.bytes });
        if (kept && cut)
          turn.show(session.messages.findLast(({ role }) => role === "assistant")?.content ?? turn.answer);
        return kept;
      } catch (error) {
        if (error instanceof Unreachable) this.#on.unreachable();
        return !cut; // all of it was received: then only this question failed
      }
    }
  }

  #take(session) {
    this.#saved = true;
    this.title = session.title ?? "";
    this.#there = session.turns;
    this.position = session.position;
    this.bytes = session.bytes;
  }

  #showSystem(text) {
    this.#system = text;
    this.element.querySelector(".system")?.remove();
    const note = h("details", { class: "system" }, h("summary", {}, "Instructions"), h("p", {}, text));
    this.element.prepend(note);
  }
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
