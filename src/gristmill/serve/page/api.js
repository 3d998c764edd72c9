/** The server's API. */
import { EventParser } from "./events.js";

const KEY = "gristmill.key";

/** A call that did not succeed. status: of HTTP, 0 where there was no answer. */
export class ApiFailure extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

/** The response, if it is a success. Throws ApiFailure, and AbortError where the signal says so. */
async function call(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiFailure("The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  throw new ApiFailure(
    messageOf(text) || `The server answered ${response.status}.`,
    response.status,
    response.headers.get("retry-after"),
  );
}

/** The message of an error's body, "" where there is none. */
function messageOf(text) {
  try {
    const { error, message } = JSON.parse(text);
    const found = error?.message ?? (typeof error === "string" ? error : message);
    return typeof found === "string" ? found : "";
  } catch {
    return "";
  }
}

/** The models' entries. */
export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** Whether the server takes requests: "ready", or what it says instead. */
export async function readiness() {
  try {
    await call("ready");
    return "ready";
  } catch (error) {
    if (error.status !== 503) throw error;
    return "not ready";
  }
}

/** Sums of the named gauges, null for those that are absent. */
export async function gauges(...names) {
  const lines = (await (await call("metrics")).text()).split("\n");
  return names.map((name) => {
    const values = lines
      .filter((line) => line.startsWith(name) && " {".includes(line.charAt(name.length)))
      .map((line) => Number(line.slice(line.lastIndexOf(" ") + 1)));
    return values.length ? values.reduce((sum, value) => sum + value) : null;
  });
}

/** The chunks of a streamed chat completion. Throws ApiFailure, also for an error inside of the stream. */
export async function* chat(request, signal) {
  const response = await call("v1/chat/completions", { body: request, signal });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        throw new ApiFailure("The connection broke before the answer was complete.");
      }
      if (read.done) throw new ApiFailure("The answer ended early.");
      for (const data of parser.push(decoder.decode(read.value, { stream: true }))) {
        if (data === "[DONE]") return;
        let chunk;
        try {
          chunk = JSON.parse(data);
        } catch {
          throw new ApiFailure("The server sent something that is not JSON.");
        }
        if (chunk.error) throw new ApiFailure(messageOf(data) || "The server failed.", 500);
        yield chunk;
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
