// The page: which conversation is shown, and how the parts hear of each other.

import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { announce, h } from "./dom.js";
import { Follower } from "./follow.js";
import { MemoryPanel } from "./memory.js";
import { SessionList } from "./sessions.js";
import { Settings } from "./settings.js";

const $ = (id) => document.getElementById(id);
const NARROW = matchMedia("(max-width: 52rem)"); // style.css has the same width

const api = new Api(askKey);
const settings = new Settings();
const memory = new MemoryPanel(api);
const connection = new Connection(start);
const follower = new Follower($("log"), $("shown"), $("jump"));
const list = new SessionList(api, {
  failed,
  renamed: ({ id, title }) => {
    const renamed = conversations.get(id);
    if (renamed) renamed.title = title;
    draw();
  },
  deleting: (id) => conversations.get(id)?.stop(),
  deleted: (id) => {
    conversations.delete(id);
    if (current.id === id) begin();
  },
});
const composer = new Composer({
  send: (text) => {
    keep(current);
    follower.toEnd();
    current.send(text);
  },
  stop: () => current.stop(),
  editLast: () => current.last?.edit(),
});

const conversations = new Map(); // the one that is shown, and those that go on in the background
let model = null;
let current = made(newId());

function made(id) {
  const options = async () => ({ model: await modelName(), system: settings.system, ...settings.sampling });
  return new Conversation(id, api, options, {
    change: draw,
    grown: (one) => one === current && memory.count(one),
    settled: (one) => {
      if (one === current) memory.follow(one);
      else if (one.last.state !== "failed") conversations.delete(one.id);
      if (one.last.state === "failed") model = null; // perhaps it is another server now
      list.refresh().catch(failed);
    },
    forked: ({ id: forked }) => {
      location.hash = forked;
      announce("This is a new conversation with the same past.");
      list.refresh().catch(failed);
    },
    failed,
    unreachable: () => connection.lost(),
  });
}

/** Remembers a conversation, and gives it an address once it is more than an empty page. */
function keep(conversation) {
  conversations.set(conversation.id, conversation);
  if (location.hash.slice(1) !== conversation.id) history.replaceState(null, "", `#${conversation.id}`);
}

/** Shows an empty conversation. */
function begin() {
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  show(made(newId()));
  composer.focus();
}

function show(conversation) {
  const done = !current.answering && current.last?.state !== "failed";
  if (done && conversation !== current) conversations.delete(current.id);
  current = conversation;
  $("shown").replaceChildren(conversation.element);
  follower.toEnd();
  draw();
  memory.follow(conversation);
  if (NARROW.matches) drawer(false);
}

/** Shows the conversation that the address names. */
async function open() {
  const id = location.hash.slice(1);
  if (id === "" || !/^[\w-]{1,64}$/.test(id)) return begin();
  const known = conversations.get(id);
  const conversation = known ?? made(id);
  conversations.set(id, conversation);
  try {
    if (!known) await conversation.load();
    if (location.hash.slice(1) === id) show(conversation);
  } catch (error) {
    conversations.delete(id);
    if (error.status === 404) {
      begin();
      tell("This conversation is not on the server any more.");
    } else failed(error);
  }
}

function draw() {
  const empty = current.empty && !current.answering;
  $("welcome").hidden = !empty;
  $("title").textContent = empty ? "New conversation" : current.title || "Untitled";
  document.title = empty || !current.title ? "bmojo-edge" : `${current.title} · bmojo-edge`;
  composer.answering = current.answering;
  memory.count(current);
  list.mark(current.id, new Set([...conversations.values()].filter((one) => one.answering).map(({ id }) => id)));
}

/** Shows an error that belongs to no turn. */
function failed(error) {
  if (error.name === "Unreachable" || error.code === "shutting_down") connection.lost();
  else tell(error.message);
}

function tell(message) {
  const close = h("button", { type: "button", onclick: () => $("notice").replaceChildren() }, "Close");
  $("notice").replaceChildren(h("p", { role: "alert" }, message, " ", close));
}

function askKey(again) {
  const dialog = $("key");
  const input = dialog.querySelector("input");
  $("key-refused").hidden = !again;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      resolve(dialog.returnValue === "key" ? input.value.trim() : null);
      composer.focus();
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The list of conversations: a column on wide screens, which can be folded, and a drawer on narrow ones. */
function drawer(open) {
  document.body.classList.toggle(NARROW.matches ? "drawer-open" : "list-folded", NARROW.matches ? open : !open);
  $("menu").setAttribute("aria-expanded", String(open));
  $("sidebar").inert = !open;
}

function drawerIsOpen() {
  return !$("sidebar").inert;
}

/** The name of the server's model, asked for where it is not known. */
async function modelName() {
  if (model === null) {
    model = (await api.call("GET", "v1/models")).data[0].id;
    $("model").textContent = model;
  }
  return model;
}

/** Everything that comes from the server, at first and after it was away. */
async function start() {
  try {
    model = null;
    await modelName();
    await catchUp();
    if (current.empty) await open();
  } catch (error) {
    failed(error);
  }
}

/** Other windows may have changed the list and the conversation that is shown. */
async function catchUp() {
  await list.refresh();
  const there = list.about(current.id);
  const settled = !current.answering && current.last?.state !== "failed";
  if (there && settled && there.turns !== current.turns) await current.load();
}

$("new").addEventListener("click", begin);
$("menu").addEventListener("click", () => drawer(!drawerIsOpen()));
$("scrim").addEventListener("click", () => drawer(false));
$("open-settings").addEventListener("click", () => settings.open());
$("meter").addEventListener("click", () => {
  if (memory.open) return memory.hide();
  memory.show();
  memory.look(current);
});
$("close-memory").addEventListener("click", () => memory.hide());
window.addEventListener("hashchange", open);
document.addEventListener("visibilitychange", () => document.hidden || model === null || catchUp().catch(failed));
NARROW.addEventListener("change", () => drawer(!NARROW.matches));

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Escape") {
    if (NARROW.matches && drawerIsOpen()) drawer(false);
    else if (current.answering) current.stop();
    else memory.hide();
  } else if (command && !event.shiftKey && event.key.toLowerCase() === "k") {
    drawer(true);
    $("find").focus();
    $("find").select();
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") begin();
  else if (event.altKey && event.code === "KeyM" && !$("meter").hidden) $("meter").click();
  else return;
  event.preventDefault();
});

drawer(!NARROW.matches);
show(current);
composer.focus();
start();
