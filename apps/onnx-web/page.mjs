// The page: text in, text out. `?model=ADDRESS` names the export, `?prefill=0` saves memory, `?tokens=N` bounds an answer.

import * as ort from "onnxruntime-web/wasm";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { Model } from "./bmojo.mjs";

const asked = new URLSearchParams(location.search);
const folder = new URL(asked.get("model") ?? "model", location.href).href.replace(/\/$/, "");
const most = Number(asked.get("tokens") ?? 256);
const [form, prompt, chat, button, answer, status] = ["form", "prompt", "chat", "send", "answer", "status"].map((id) => document.getElementById(id));

async function json(name) {
  const found = await fetch(`${folder}/${name}`);
  return found.ok ? found.json() : null;
}

async function opened() {
  const [tokenizer, config, generation] = await Promise.all(["tokenizer.json", "tokenizer_config.json", "generation_config.json"].map(json));
  if (!tokenizer) throw new Error(`${folder}: has no tokenizer.json`);
  const text = new Tokenizer(tokenizer, config ?? {});
  const written = await fetch(`${folder}/chat_template.jinja`);
  const template = written.ok ? await written.text() : config?.chat_template;
  const ends = [generation?.eos_token_id ?? []].flat();
  if (config?.eos_token) ends.push(text.token_to_id(config.eos_token.content ?? config.eos_token));
  const model = await Model.load(ort, folder, { prefill: asked.get("prefill") !== "0" });
  return { model, text, config, template, stop: new Set(ends) };
}

function ids({ text, template, config }) {
  if (!chat.checked) return text.encode(prompt.value).ids;
  const messages = [{ role: "user", content: prompt.value }];
  const rendered = new Template(template).render({ ...config, messages, add_generation_prompt: true });
  return text.encode(rendered, { add_special_tokens: false }).ids;
}

async function reply(held) {
  const asked = ids(held);
  const begun = performance.now();
  const tokens = [];
  let first = 0;
  for await (const token of held.model.greedy(asked, most, held.stop)) {
    first ||= performance.now();
    tokens.push(token);
    answer.textContent = held.text.decode(tokens, { skip_special_tokens: true });
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens.length > 1 ? `, ${((tokens.length - 1) / seconds).toFixed(1)} tokens/s` : "";
    status.textContent = `${asked.length} tokens read in ${((first - begun) / 1000).toFixed(1)} s, ${tokens.length} written${speed}`;
    await new Promise((resolve) => setTimeout(resolve)); // let the page be drawn
  }
}

try {
  status.textContent = "Loading the model";
  const held = await opened();
  chat.disabled = !held.template;
  chat.checked = Boolean(held.template);
  status.textContent = `Ready: ${ort.env.wasm.numThreads || 1} threads`;
  button.disabled = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    answer.textContent = "";
    document.body.dataset.answered = "";
    try {
      await reply(held);
    } catch (error) {
      status.textContent = `${error}`;
    }
    document.body.dataset.answered = "yes";
    button.disabled = false;
  });
} catch (error) {
  status.textContent = `${error}`;
}
