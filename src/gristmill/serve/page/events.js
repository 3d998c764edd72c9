/** Reads server-sent events. */
export class EventParser {
  #rest = "";

  /** Takes text as it comes, cut anywhere; returns the data of the events that are complete. */
  push(text) {
    const found = [];
    this.#rest += text;
    // A line break at the very end may be the first half of \r\n: it waits for what follows.
    const waits = this.#rest.endsWith("\r");
    const events = (waits ? this.#rest.slice(0, -1) : this.#rest).replace(/\r\n?/g, "\n").split("\n\n");
    this.#rest = events.pop() + (waits ? "\r" : "");
    for (const event of events) {
      const data = event
        .split("\n")
        .filter((line) => line === "data" || line.startsWith("data:"))
        .map((line) => line.slice(5).replace(/^ /, ""));
      if (data.length) found.push(data.join("\n"));
    }
    return found;
  }
}
