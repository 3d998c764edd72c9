/** The page: chats, the running answers, the server's figures. */
import * as api from "./api.js";
import { byId, element } from "./dom.js";
import { MessageView } from "./message.js";
import * as settings from "./settings.js";
import * as store from "./store.js";

const POLL_MS = 2000;
const SAVE_MS = 1000;
/** How near the end (pixels) the reader must be to be taken along. */
const NEAR = 80;
const NARROW = matchMedia("(max-width: 899px)");

let chats = store.loadChats();
let chat = chats.find((one) => one.id === store.currentId()) ?? newChat();
let model = null;
let views = [];
/** Chat id to the AbortController of its running answer. */
const runs = new Map();
const [input, log, scroller] = ["input", "log", "scroll"].map(byId);

function newChat() {
  // crypto.randomUUID exists on https and localhost only.
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((one) => one.toString(16).padStart(2, "0"));
  return { id: id.join(""), updated: Date.now(), messages: [] };
}

const titleOf = (one) => one.messages[0]?.content.trim().split("\n")[0].slice(0, 60) || "New chat";

function announce(text) {
  byId("status").textContent = text;
}

function notify(text, ...buttons) {
  byId("notice").replaceChildren(text, ...buttons);
  byId("notice").hidden = !text;
}

// ---- chats -----------------------------------------------------------------------------------------------

function save(one) {
  if (!one.messages.length) return;
  one.updated = Date.now();
  if (!chats.includes(one)) chats.push(one);
  if (!store.saveChat(one)) notify("This chat cannot be kept in this browser: there is no room for it.");
  showChats();
}

function showChats() {
  chats.sort((a, b) => b.updated - a.updated);
  const rows = chats.map((one) => {
    const open = element("button", { type: "button", className: "chat-name" }, titleOf(one));
    if (one === chat) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => openChat(one));
    const remove = element("button", { type: "button", className: "quiet", title: "Delete" }, "×");
    remove.setAttribute("aria-label", `Delete the chat “${titleOf(one)}”`);
    remove.addEventListener("click", () => removeChat(one));
    return element("li", {}, open, remove);
  });
  const list = byId("chats");
  const focused = [...list.querySelectorAll("button")].indexOf(document.activeElement);
  list.replaceChildren(...rows);
  if (focused >= 0) (list.querySelectorAll("button")[focused] ?? byId("new-chat")).focus();
}

function openChat(one) {
  chat = one;
  store.setCurrentId(one.id);
  notify("");
  showChats();
  showMessages();
  closePanel("chats-panel");
  input.focus();
}

function removeChat(one) {
  runs.get(one.id)?.abort();
  chats = chats.filter((other) => other !== one);
  store.dropChat(one.id);
  if (one === chat) openChat(newChat());
  else showChats();
  const undo = element("button", { type: "button" }, "Undo");
  undo.addEventListener("click", () => {
    save(one);
    openChat(one);
  });
  notify("The chat is deleted. ", undo);
}

// ---- the conversation ------------------------------------------------------------------------------------

function showMessages() {
  views = chat.messages.map((message) => new MessageView(message, regenerate));
  log.replaceChildren(...views.map((view) => view.node));
  byId("empty").hidden = views.length > 0;
  showRun();
  toEnd();
}

/** What depends on whether the open chat's answer is running. */
function showRun() {
  const running = runs.has(chat.id);
  const focused = document.activeElement;
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  if (running ? focused === byId("send") : focused === byId("stop")) input.focus();
  views.forEach((view, at) => view.node.classList.toggle("last", at === views.length - 1));
}

const isNearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  byId("to-end").hidden = true;
}

function updateView(message) {
  const view = views.find((one) => one.message === message);
  if (!view) return; // of another chat
  const follow = isNearEnd();
  view.update();
  if (follow) toEnd();
  else byId("to-end").hidden = false;
}

/** The messages as the server wants them: roles in turn, without answers that have no text. */
function history(messages) {
  const sent = [];
  const system = settings.systemPrompt();
  if (system.trim()) sent.push({ role: "system", content: system });
  for (const { role, content } of messages) {
    if (role === "assistant" && !content) continue;
    if (sent.at(-1)?.role === role) sent.at(-1).content += `\n\n${content}`;
    else sent.push({ role, content });
  }
  return sent;
}

function send() {
  const content = input.value;
  if (!content.trim() || runs.has(chat.id) || !mayAsk()) return;
  chat.messages.push({ role: "user", content });
  input.value = "";
  fit();
  ask();
}

function regenerate() {
  if (runs.has(chat.id) || !mayAsk()) return;
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  ask();
  input.focus();
}

/** Whether the settings can be sent; shows the wrong one if not. */
function mayAsk() {
  const wrong = settings.firstWrong();
  if (wrong) {
    openPanel("settings");
    wrong.focus();
    announce("A setting is out of range.");
  }
  return !wrong;
}

/** Asks for an answer to the open chat and shows it as it comes. */
async function ask() {
  const one = chat;
  const request = {
    messages: history(one.messages),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...settings.sampling(),
  };
  const answer = { role: "assistant", content: "", reasoning: "", state: "running", error: null };
  one.messages.push(answer);
  const control = new AbortController();
  runs.set(one.id, control);
  store.setCurrentId(one.id);
  notify("");
  save(one);
  showMessages();
  announce("The answer is being written.");

  const began = performance.now();
  let firstAt = null;
  let lastAt = began;
  let pieces = 0;
  let usage = null;
  let frame = 0;
  let saved = began;
  const measure = () => {
    if (firstAt === null) return;
    const tokens = usage?.completion_tokens ?? pieces;
    const seconds = (lastAt - firstAt) / 1000;
    answer.stats = {
      tokens,
      exact: usage !== null,
      first: (firstAt - began) / 1000,
      rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
      prompt: usage?.prompt_tokens ?? null,
      cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
    };
  };
  const show = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    measure();
    updateView(answer);
  };
  try {
    if (model === null) await loadModel();
    request.model = model;
    for await (const chunk of api.chat(request, control.signal)) {
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices?.[0];
      const delta = choice?.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning ?? "";
      if (delta.content || thought) {
        lastAt = performance.now();
        firstAt ??= lastAt;
        pieces += 1;
        answer.content += delta.content ?? "";
        answer.reasoning += thought;
      }
      if (choice?.finish_reason) answer.finish = choice.finish_reason;
      frame ||= requestAnimationFrame(show);
      if (performance.now() - saved > SAVE_MS) {
        saved = performance.now();
        store.saveChat(one);
      }
    }
    answer.state = "done";
  } catch (error) {
    if (control.signal.aborted) {
      answer.state = "stopped";
    } else {
      answer.state = "failed";
      answer.error = error instanceof api.ApiFailure ? error.message : `The page failed: ${error.message}`;
      if (error.retryAfter) answer.error = `${answer.error.replace(/\.?$/, ".")} The server says to wait ${error.retryAfter} s.`;
      if (error.status === 401) askForKey();
    }
  }
  runs.delete(one.id);
  show();
  showRun();
  if (chats.includes(one)) save(one); // unless it was deleted meanwhile
  announce(
    { done: `The answer is complete. ${answer.content.slice(0, 2000)}`, stopped: "The answer is stopped." }[
      answer.state
    ] ?? answer.error,
  );
}

// ---- the server ------------------------------------------------------------------------------------------

function askForKey() {
  const why = api.hasKey() ? "The server does not take this API key." : "This server wants an API key.";
  byId("key-text").textContent = `${why} It is kept until this tab is closed.`;
  if (!byId("key-form").hidden) return;
  byId("key-form").hidden = false;
  if (!document.activeElement || document.activeElement === input || document.activeElement === document.body)
    byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey(byId("key").value.trim());
  byId("key").value = "";
  byId("key-form").hidden = true;
  input.focus();
  pollOnce();
  if (chat.messages.at(-1)?.state === "failed") regenerate();
});

async function loadModel() {
  model = (await api.models())[0].id;
  byId("model").textContent = byId("model").title = model;
  document.title = `${model} – gristmill`;
}

const show = (id, value) => (byId(id).textContent = value === null ? "–" : String(value));

/** Asks the server how it is. Without a key it is not asked again until there is one. */
async function poll() {
  if (document.hidden || !byId("key-form").hidden) return;
  let state = "unreachable";
  try {
    state = await api.readiness();
    if (model === null) await loadModel();
    const [kv, running, waiting] = await api.gauges(
      "gristmill:kv_cache_usage_perc",
      "gristmill:num_requests_running",
      "gristmill:num_requests_waiting",
    );
    byId("figures").hidden = kv === null && running === null;
    byId("kv").value = kv ?? 0;
    show("kv-text", kv === null ? null : `${(kv * 100).toFixed(kv < 0.1 ? 1 : 0)} %`);
    show("running", running);
    show("waiting", waiting);
  } catch (error) {
    if (error.status === 401) {
      state = "key wanted";
      askForKey();
    }
    byId("figures").hidden = true;
  }
  byId("server-state").textContent = { ready: "Ready", "not ready": "Loading or draining" }[state] ??
    { unreachable: "Unreachable", "key wanted": "An API key is wanted" }[state];
  byId("dot").className = `dot ${state.replace(" ", "-")}`;
}

let polling = false;
async function pollOnce() {
  if (polling) return;
  polling = true;
  try {
    await poll();
  } finally {
    polling = false;
  }
}

// ---- panels and keys -------------------------------------------------------------------------------------

const OPENERS = { "chats-panel": "show-chats", settings: "show-settings" };

function showPanel(id, open) {
  const panel = byId(id);
  panel.classList.toggle("open", open);
  byId(OPENERS[id]).setAttribute("aria-expanded", String(open));
  byId("shade").classList.toggle("open", Object.keys(OPENERS).some((one) => byId(one).classList.contains("open")));
}

function openPanel(id) {
  showPanel(id, true);
}

/** Closes a panel; the focus goes back to its button where it was inside. */
function closePanel(id) {
  const inside = byId(id).contains(document.activeElement);
  showPanel(id, false);
  if (inside) byId(OPENERS[id]).focus();
}

for (const [id, opener] of Object.entries(OPENERS)) {
  byId(opener).addEventListener("click", () => {
    if (byId(id).classList.contains("open")) {
      closePanel(id);
      return;
    }
    openPanel(id);
    if (NARROW.matches) byId(id).querySelector("button, textarea, input").focus();
  });
}
byId("hide-settings").addEventListener("click", () => closePanel("settings"));
byId("shade").addEventListener("click", () => Object.keys(OPENERS).forEach(closePanel));

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  const over = Object.keys(OPENERS).find((id) => byId(id).classList.contains("open"));
  const inside = over && byId(over).contains(document.activeElement);
  if (over && (inside || !runs.has(chat.id))) closePanel(over);
  else runs.get(chat.id)?.abort();
});

/** The message field grows with its text; the style sheet bounds it. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + input.offsetHeight - input.clientHeight}px`;
}

input.addEventListener("input", fit);
input.addEventListener("keydown", (event) => {
  // Enter also ends the composing of a character, which is no sending.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => runs.get(chat.id)?.abort());
byId("new-chat").addEventListener("click", () => openChat(newChat()));
byId("to-end").addEventListener("click", toEnd);
scroller.addEventListener("scroll", () => {
  if (isNearEnd()) byId("to-end").hidden = true;
});
addEventListener("pagehide", () => {
  for (const control of runs.values()) control.abort();
  for (const one of chats) if (runs.has(one.id)) store.saveChat(one);
});
document.addEventListener("visibilitychange", pollOnce);
store.onOtherTab(() => {
  // Chats with a running answer, and the open one, are this tab's.
  const own = chats.filter((one) => one === chat || runs.has(one.id));
  const ids = new Set(own.map((one) => one.id));
  chats = [...own, ...store.loadChats().filter((one) => !ids.has(one.id))];
  showChats();
});

settings.setUp();
showChats();
showMessages();
fit();
pollOnce();
setInterval(pollOnce, POLL_MS);
