// Runs an ONNX export (docs/export.md) with onnxruntime-web: one sequence, its state a value that every call replaces.
// Knows token ids only; page.mjs knows text.

const FORMAT = "bmojo-edge onnx";
const VERSION = 1;

async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return answer;
}

export class Model {
  constructor(ort, manifest, sessions) {
    this.ort = ort;
    this.manifest = manifest;
    this.sessions = sessions;
    this.chunk = manifest.chunk;
    this.turns = manifest.turns?.map(BigInt);
  }

  // `folder` is the export's address. Without `prefill` a prompt is read token by token, and half the memory is needed.
  static async load(ort, folder, { executionProviders = ["wasm"], prefill = true } = {}) {
    const manifest = await (await fetched(`${folder}/manifest.json`)).json();
    if (manifest.format !== FORMAT || manifest.version !== VERSION) {
      throw new Error(`${folder}/manifest.json: is ${manifest.format} version ${manifest.version}, this page reads ${FORMAT} version ${VERSION}`);
    }
    const data = new Uint8Array(await (await fetched(`${folder}/weights.bin`)).arrayBuffer());
    const sessions = {};
    for (const [name, graph] of Object.entries(manifest.graphs)) {
      if (name === "prefill" && !prefill) continue;
      const content = new Uint8Array(await (await fetched(`${folder}/${graph.file}`)).arrayBuffer());
      sessions[name] = await ort.InferenceSession.create(content, {
        executionProviders,
        externalData: [{ path: "weights.bin", data }],
      });
    }
    return new Model(ort, manifest, sessions);
  }

  // The state before the first token.
  begin() {
    const leaves = {};
    for (const { name, shape, fill } of this.manifest.state) {
      const size = shape.reduce((a, b) => a * b, 1);
      leaves[name] = new this.ort.Tensor("float32", new Float32Array(size).fill(fill), [1, ...shape]);
    }
    return { position: 0, leaves };
  }

  // Logits (Float32Array) after `ids`, and the state: whole chunks at once where the state stands at the beginning of one.
  async feed(ids, state) {
    let logits = null;
    for (let at = 0; at < ids.length; ) {
      const aligned = state.position % this.chunk === 0;
      if (aligned && this.sessions.commit) ({ state } = await this.#run("commit", [], 1, state));
      const whole = aligned && this.sessions.prefill && at + this.chunk <= ids.length;
      const size = whole ? this.chunk : 1;
      const found = await this.#run(size > 1 ? "prefill" : "decode", ids.slice(at, at + size), size, state);
      logits = found.said.logits;
      state = { position: state.position + size, leaves: found.state.leaves };
      at += size;
    }
    return { logits, state };
  }

  // The likeliest continuation of `ids`, token by token, until one of `stop` or `most` tokens.
  async *greedy(ids, most, stop = new Set()) {
    let { logits, state } = await this.feed(ids, this.begin());
    for (let n = 0; n < most; n++) {
      const token = likeliest(logits);
      if (stop.has(token)) return;
      yield token;
      if (n + 1 < most) ({ logits, state } = await this.feed([token], state));
    }
  }

  async #run(name, ids, size, state) {
    const graph = this.manifest.graphs[name];
    const given = this.#place(state.position, size);
    given.tokens = new this.ort.Tensor("int32", Int32Array.from(ids), [1, ids.length]);
    const feeds = {};
    for (const input of graph.inputs) feeds[input] = given[input] ?? state.leaves[input];
    const outputs = await this.sessions[name].run(feeds);
    const leaves = { ...state.leaves };
    const said = {};
    for (const output of graph.outputs) {
      if (output.startsWith("new.")) leaves[output.slice(4)] = outputs[output];
      else said[output] = outputs[output].data;
    }
    return { said, state: { position: state.position, leaves } };
  }

  // The position as the graphs take it, and the angles of `size` tokens from it, exact at any distance.
  #place(position, size) {
    const { base, period } = this.manifest.position;
    const wrapped = position < base ? position : base + ((position - base) % period);
    const given = { position: new this.ort.Tensor("int32", Int32Array.of(wrapped), [1]) };
    if (this.turns) {
      const half = this.turns.length;
      const cos = new Float32Array(size * half);
      const sin = new Float32Array(size * half);
      for (let t = 0; t < size; t++) {
        for (let j = 0; j < half; j++) {
          const phase = BigInt.asIntN(64, BigInt(position + t) * this.turns[j]);
          const angle = Number(phase) * ((2 * Math.PI) / 2 ** 64);
          cos[t * half + j] = Math.cos(angle);
          sin[t * half + j] = Math.sin(angle);
        }
      }
      given.cos = new this.ort.Tensor("float32", cos, [1, size, half]);
      given.sin = new this.ort.Tensor("float32", sin, [1, size, half]);
    }
    return given;
  }
}

export function likeliest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}
