/**
 * Chats in localStorage, one entry each, so that two tabs do not overwrite each other's; what was open in this
 * tab in sessionStorage. A chat: {id, updated (ms), messages}. A message: {role, content} and, of answers,
 * {reasoning, state: "running" | "done" | "stopped" | "failed", error, finish, stats}.
 */
const PREFIX = "gristmill.chat.";
const CURRENT = "gristmill.current";
const SETTINGS = "gristmill.settings";
const MOST_CHATS = 50;
/** Characters of all chats together; browsers give about 5 million. */
const MOST_CHARS = 2_000_000;

function parse(text, otherwise) {
  try {
    return JSON.parse(text) ?? otherwise;
  } catch {
    return otherwise;
  }
}

const keys = () => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));

/** A stored chat, null where the entry is none. A running answer in it is one that a reload cut off. */
function stored(key) {
  const chat = parse(localStorage.getItem(key), null);
  const good =
    Array.isArray(chat?.messages) &&
    PREFIX + chat.id === key &&
    chat.messages.every((one) => typeof one?.content === "string");
  if (!good) return null;
  for (const message of chat.messages) if (message.state === "running") message.state = "stopped";
  return chat;
}

/** All chats, newest first. */
export function loadChats() {
  return keys()
    .map(stored)
    .filter(Boolean)
    .sort((a, b) => b.updated - a.updated);
}

/** Keeps a chat; the oldest others go where there is no room. Returns whether it was kept, as a whole. */
export function saveChat(chat) {
  const text = JSON.stringify(chat);
  if (text.length > MOST_CHARS) return false;
  const others = keys().filter((key) => key !== PREFIX + chat.id);
  let size = others.reduce((sum, key) => sum + localStorage.getItem(key).length, text.length);
  if (others.length >= MOST_CHATS || size > MOST_CHARS) {
    const age = new Map(others.map((key) => [key, stored(key)?.updated ?? 0]));
    others.sort((a, b) => age.get(a) - age.get(b));
  }
  while (others.length >= MOST_CHATS || size > MOST_CHARS) {
    const oldest = others.shift();
    size -= localStorage.getItem(oldest).length;
    localStorage.removeItem(oldest);
  }
  try {
    localStorage.setItem(PREFIX + chat.id, text);
    return true;
  } catch {
    return false; // private windows may have no room at all
  }
}

export function dropChat(id) {
  localStorage.removeItem(PREFIX + id);
}

/** Calls back when another tab changed a chat. */
export function onOtherTab(callback) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) callback();
  });
}

export const currentId = () => sessionStorage.getItem(CURRENT);
export const setCurrentId = (id) => sessionStorage.setItem(CURRENT, id);

export const loadSettings = () => {
  const value = parse(localStorage.getItem(SETTINGS), {});
  return typeof value === "object" ? value : {};
};

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // they hold until the page is left
  }
}
