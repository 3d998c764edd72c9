/** The sampling settings: their fields, and what of them goes into a request. */
import { byId, element } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";

// name, label, smallest, largest, step ("1": whole numbers), what it does
const FIELDS = [
  ["temperature", "Temperature", 0, 100, "any", "0 takes the likeliest token; more is more varied."],
  ["top_p", "Top p", 0, 1, "any", "Keeps the likeliest tokens up to this probability together."],
  ["top_k", "Top k", 0, 2 ** 31 - 1, "1", "Keeps this many tokens; 0 keeps all."],
  ["min_p", "Min p", 0, 1, "any", "Keeps tokens of at least this share of the likeliest."],
  ["repetition_penalty", "Repetition penalty", 0.01, 100, "any", "1 is none."],
  ["presence_penalty", "Presence penalty", -2, 2, "any", "0 is none."],
  ["frequency_penalty", "Frequency penalty", -2, 2, "any", "0 is none."],
  ["max_tokens", "Most tokens", 1, 2 ** 31 - 1, "1", "Length of an answer."],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, "1", "The same seed gives the same answer."],
];

const inputs = new Map();

/** Builds the fields with what was kept. */
export function setUp() {
  const kept = loadSettings();
  for (const [name, label, min, max, step, about] of FIELDS) {
    const input = element("input", { id: `set-${name}`, name, type: "number", min, max, step });
    input.placeholder = "default";
    input.setAttribute("aria-describedby", `about-${name}`);
    inputs.set(name, input);
    const text = element("small", { id: `about-${name}` }, about);
    const title = element("label", { htmlFor: input.id }, label);
    byId("fields").append(element("p", { className: "field number" }, title, input, text));
    input.dataset.about = about;
  }
  inputs.set("system", byId("system"));
  inputs.set("stop", byId("stops"));
  for (const [name, input] of inputs) {
    if (typeof kept[name] === "string") input.value = kept[name];
    input.addEventListener("input", changed);
  }
  byId("reset").addEventListener("click", () => {
    for (const input of inputs.values()) input.value = "";
    changed();
  });
  byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
  firstWrong();
}

function changed() {
  saveSettings(Object.fromEntries([...inputs].map(([name, input]) => [name, input.value])));
  firstWrong();
}

/** Marks the fields whose values cannot be sent, and returns the first of them. */
export function firstWrong() {
  let first = null;
  for (const [name, , min, max, step] of FIELDS) {
    const input = inputs.get(name);
    const good = input.checkValidity();
    input.setAttribute("aria-invalid", String(!good));
    const kind = step === "1" ? "a whole number" : "a number";
    const wrong = max > 1e6 ? `${kind} from ${min}` : `${kind} from ${min} to ${max}`;
    byId(`about-${name}`).textContent = good ? input.dataset.about : `Must be ${wrong}.`;
    if (!good) first ??= input;
  }
  return first;
}

/** The fields of a request that are set. */
export function sampling() {
  const found = {};
  for (const [name] of FIELDS) {
    const { value } = inputs.get(name);
    if (value !== "") found[name] = Number(value);
  }
  const stops = inputs
    .get("stop")
    .value.split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\([nt\\])/g, (_, char) => ({ n: "\n", t: "\t", "\\": "\\" })[char]));
  if (stops.length) found.stop = stops;
  return found;
}

export const systemPrompt = () => inputs.get("system").value;
