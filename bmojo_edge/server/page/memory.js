// What the model remembers: the meter (position grows, bytes do not), where the attention of the last answer went, and
// the tokens that each layer keeps, one by one.

import { h, svg } from "./dom.js";

const SLOW = 3000; // milliseconds: where looking takes longer, it waits to be asked

const MEMORIES = { window: "window", fading: "fading", eidetic: "eidetic", sinks: "sinks", storage: "storage" };

/** Bytes as people read them. */
export function bytesText(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  const power = Math.min(3, Math.floor(Math.log2(bytes) / 10));
  return `${(bytes / 1024 ** power).toFixed(1)} ${["", "KiB", "MiB", "GiB"][power]}`;
}

export class MemoryPanel {
  #api;
  #panel = document.getElementById("memory");
  #meter = document.getElementById("meter");
  #found = document.getElementById("memory-found");
  #detail = document.getElementById("token-detail");
  #aborter = null;
  #shown = null; // the conversation whose memories are shown
  #layer = null; // whose tokens are shown
  #took = 0; // milliseconds of the last look

  constructor(api) {
    this.#api = api;
  }

  get open() {
    return !this.#panel.hidden;
  }

  /** Position and bytes as they are now; cheap, for every token. */
  count(conversation) {
    const { position, said, bytes, history } = conversation;
    this.#meter.hidden = bytes === null;
    if (bytes === null) return;
    const tokens = (position + said).toLocaleString("en");
    this.#meter.querySelector(".tokens").textContent = `${tokens} tokens`;
    this.#meter.querySelector(".bytes").textContent = bytesText(bytes);
    this.#meter.setAttribute("aria-label", `Memory: ${tokens} tokens in ${bytesText(bytes)}. Show what is kept.`);
    if (!this.open) return;
    document.getElementById("position").textContent = tokens;
    document.getElementById("bytes").textContent = bytesText(bytes);
    document.getElementById("exact-bytes").textContent = `${bytes.toLocaleString("en")} bytes`;
    if (said === 0) document.getElementById("chart").replaceChildren(...chart(history));
  }

  show() {
    this.#panel.hidden = false;
    this.#meter.setAttribute("aria-expanded", "true");
  }

  hide() {
    if (!this.open) return;
    this.#aborter?.abort();
    this.#panel.hidden = true;
    this.#meter.setAttribute("aria-expanded", "false");
    if (this.#panel.contains(document.activeElement)) this.#meter.focus();
  }

  /** The conversation has changed, or is another one: looks where that is quick, and else offers to. */
  follow(conversation) {
    if (this.open) this.look(conversation, this.#took < SLOW);
  }

  /** Asks the server what this conversation keeps, which is quick, and where its attention went, and shows it. */
  async look(conversation, attention = true) {
    this.#aborter?.abort();
    this.count(conversation);
    if (!conversation.saved) return this.#say("There is nothing to remember yet.");
    if (conversation.answering) return this.#say("The memories are looked into when the answer is complete.");
    const aborter = (this.#aborter = new AbortController());
    this.#found.setAttribute("aria-busy", "true");
    const path = `v1/sessions/${conversation.id}/memory`;
    const ask = (what) => this.#api.call("GET", what, undefined, aborter.signal);
    try {
      if (!attention || this.#shown !== conversation.id) {
        const kept = await ask(`${path}?attention=false`);
        this.#draw(kept, attention ? [looking()] : this.#offer(conversation));
        this.#shown = conversation.id;
      }
      if (attention) {
        const begun = performance.now();
        this.#draw(await ask(path));
        this.#took = performance.now() - begun;
      }
    } catch (error) {
      if (error.name !== "AbortError") this.#say(error.message);
    } finally {
      if (this.#aborter === aborter) this.#found.setAttribute("aria-busy", "false");
    }
  }

  #say(text) {
    this.#shown = null;
    this.#found.replaceChildren(h("p", { class: "note" }, text));
    this.#detail.textContent = "";
  }

  #offer(conversation) {
    const said = `Looking took ${Math.round(this.#took / 1000)} seconds the last time.`;
    const button = h("button", { type: "button", onclick: () => this.look(conversation) }, "Look now");
    return [h("p", { class: "note" }, said), button];
  }

  /** Shows what is kept; `instead`: what stands in the place of attention that is not known yet. */
  #draw(memory, instead = null) {
    const remembering = memory.layers.flatMap((layer, i) => (layer.kind === "bmojo" ? [i] : []));
    if (!remembering.includes(this.#layer)) {
      this.#layer = remembering.find((i) => memory.layers[i].eidetic.length > 0) ?? remembering[0] ?? null;
    }
    const attention = [h("h3", {}, "What the last answer was read from")];
    if (instead) attention.push(...instead);
    else if (memory.queries > 0) attention.push(bar(memory.attention, "All layers"), legend(memory.attention));
    else attention.push(h("p", { class: "note" }, memory.unknown || "There is no answer to tell of."));
    const parts = [h("section", {}, ...attention)];
    if (this.#layer === null) parts.push(h("p", { class: "note" }, "No layer of this model keeps single tokens."));
    else parts.push(this.#layers(memory), h("section", { class: "kept" }));
    this.#found.replaceChildren(...parts);
    if (this.#layer !== null) this.#drawTokens(memory);
  }

  #layers(memory) {
    const rows = memory.layers.map((layer, i) => {
      const kept = layer.kind === "bmojo" ? `${layer.eidetic.length} kept` : layer.kind;
      const choose = () => {
        this.#layer = i;
        for (const row of rows) row.setAttribute("aria-pressed", String(row === button));
        this.#drawTokens(memory);
      };
      const button = h(
        "button",
        {
          type: "button",
          "aria-pressed": String(i === this.#layer),
          onclick: choose,
          disabled: layer.kind !== "bmojo",
        },
        h("span", { class: "name" }, `Layer ${i}`),
        h("span", { class: "count" }, kept),
        memory.queries > 0 ? bar(layer.attention, `Layer ${i}`) : null,
      );
      return button;
    });
    const list = h("div", { class: "layers", role: "group", "aria-label": "Layers" }, ...rows);
    return h("section", {}, h("h3", {}, "Layers"), list);
  }

  #drawTokens(memory) {
    const { sinks, eidetic } = memory.layers[this.#layer];
    const tokens = new Map([...eidetic, ...sinks].map((token) => [token.position, token])); // some are both
    const sinkPositions = new Set(sinks.map(({ position }) => position));
    const scores = new Map(eidetic.map((token) => [token.position, token.innovation]));
    const sorted = [...tokens.values()].sort((a, b) => a.position - b.position);
    const [low, high] = [Math.min(...scores.values()), Math.max(...scores.values())];
    const line = h("div", { class: "tokens", role: "group", "aria-label": `Tokens that layer ${this.#layer} keeps` });
    let next = 0;
    for (const token of sorted) {
      if (token.position > next) {
        const gap = token.position - next;
        line.append(h("span", { class: "gap", title: `${gap.toLocaleString("en")} not kept` }, "⋯"));
      }
      next = token.position + 1;
      const innovation = scores.get(token.position) ?? null;
      const text = describe(token, innovation, sinkPositions.has(token.position));
      const chip = h(
        "button",
        { type: "button", class: "token", tabindex: "-1", "aria-label": text },
        visible(token.text),
      );
      chip.classList.toggle("sink", sinkPositions.has(token.position));
      const shade = innovation === null ? 0 : high > low ? (innovation - low) / (high - low) : 1;
      chip.style.setProperty("--shade", shade.toFixed(3));
      for (const event of ["focus", "pointerenter"])
        chip.addEventListener(event, () => (this.#detail.textContent = text));
      line.append(chip);
    }
    line.querySelector(".token")?.setAttribute("tabindex", "0");
    line.addEventListener("keydown", walk);
    const none = eidetic.length === 0 ? h("p", { class: "note" }, "This layer keeps no eidetic tokens now.") : null;
    const key = h(
      "p",
      { class: "note" },
      "The stronger the colour, the less the layer expected the token. Framed ones are sinks, kept for their place. " +
        "⋯ is what is not kept.",
    );
    const title = h("h3", {}, `Kept by layer ${this.#layer}, token by token`);
    this.#found
      .querySelector(".kept")
      .replaceChildren(title, ...(none ? [none] : []), ...(sorted.length ? [key, line] : []));
    this.#detail.textContent = "";
  }
}

function looking() {
  return h("p", { class: "note" }, "Looking… The server reads the last answer again for this.");
}

function describe(token, innovation, sink) {
  const where = `position ${token.position.toLocaleString("en")}, ${token.age.toLocaleString("en")} tokens ago`;
  const why = [innovation === null ? null : `innovation ${innovation.toPrecision(4)}`, sink ? "sink" : null];
  return [`“${visible(token.text)}”`, where, ...why.filter((one) => one !== null)].join(" · ");
}

function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
}

/** Arrow keys go from token to token. */
function walk(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const chips = [...event.currentTarget.querySelectorAll(".token")];
  const now = chips.indexOf(event.target);
  if (step === undefined || now < 0 || !chips[now + step]) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  chips[now + step].tabIndex = 0;
  chips[now + step].focus();
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
}

function bar(shares, name) {
  const told = Object.keys(MEMORIES).filter((memory) => shares[memory] > 0);
  const label = told.map((memory) => `${MEMORIES[memory]} ${percent(shares[memory])}`).join(", ");
  const parts = told.map((memory) => {
    const part = h("span", { class: `share ${memory}` });
    part.style.flexGrow = shares[memory];
    return part;
  });
  return h(
    "span",
    { class: "bar", role: "img", "aria-label": `${name}: ${label || "no attention"}`, title: label },
    ...parts,
  );
}

function legend(shares) {
  const items = Object.entries(MEMORIES).map(([memory, name]) =>
    h("li", {}, h("span", { class: `share ${memory}` }), name, " ", h("b", {}, percent(shares[memory] ?? 0))),
  );
  return h("ul", { class: "legend" }, ...items);
}

/** Position and bytes over the answers since the page was opened, each on its own scale from zero. */
function chart(history) {
  if (history.length < 2) return [];
  const line = (name, values) => {
    const most = Math.max(...values, 1);
    const points = values.map((value, i) => `${(100 * i) / (values.length - 1)},${36 - (32 * value) / most}`);
    return svg("polyline", { class: name, points: points.join(" ") });
  };
  const drawing = svg(
    "svg",
    {
      viewBox: "0 0 100 40",
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": "Position and bytes after each answer",
    },
    line(
      "position",
      history.map(({ position }) => position),
    ),
    line(
      "bytes",
      history.map(({ bytes }) => bytes),
    ),
  );
  const key = h("ul", { class: "legend" });
  for (const [name, text] of [
    ["position", "position"],
    ["bytes", "bytes"],
  ]) {
    key.append(h("li", {}, h("span", { class: `share line-${name}` }), text));
  }
  return [drawing, key];
}
