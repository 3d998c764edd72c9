/** How one message looks. */
import { copyButton, element } from "./dom.js";
import { Markdown } from "./markdown.js";

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });

/** "31 tokens · 12.5 tokens/s · first after 0.20 s" */
function figures({ tokens, exact, first, rate, prompt, cached }) {
  const about = exact ? "" : "≈ ";
  const parts = [`${about}${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (rate) parts.push(`${about}${number.format(rate)} tokens/s`);
  if (first !== null) parts.push(`first after ${first < 10 ? first.toFixed(2) : first.toFixed(0)} s`);
  if (prompt) parts.push(`prompt ${prompt}${cached ? `, ${cached} of them cached` : ""}`);
  return parts.join(" · ");
}

/** The view of a message. retry: called by its buttons; only the last answer shows them. */
export class MessageView {
  constructor(message, retry) {
    this.message = message;
    const answer = message.role === "assistant";
    this.node = element("article", { className: `message ${message.role}` });
    this.node.setAttribute("aria-label", answer ? "Answer" : "You");
    this.body = element("div", { className: "body" });
    this.node.append(this.body);
    if (!answer) {
      this.body.textContent = message.content;
      this.node.append(element("div", { className: "under" }, copyButton(() => message.content)));
      return;
    }
    this.reasoning = element("details", { className: "reasoning", hidden: true });
    this.reasoningTitle = element("summary");
    this.reasoningText = element("div", { className: "reasoning-text" });
    this.reasoning.append(this.reasoningTitle, this.reasoningText);
    this.node.prepend(this.reasoning);
    this.markdown = new Markdown(this.body);
    this.error = element("div", { className: "error", hidden: true });
    this.errorText = element("p");
    const again = element("button", { type: "button" }, "Try again");
    again.addEventListener("click", retry);
    this.error.append(this.errorText, again);
    this.under = element("div", { className: "under" });
    this.stats = element("span", { className: "stats" });
    this.copy = copyButton(() => message.content);
    this.again = element("button", { type: "button", className: "quiet regenerate" }, "Regenerate");
    this.again.addEventListener("click", retry);
    this.under.append(this.copy, this.again, this.stats);
    this.node.append(this.error, this.under);
    this.update();
  }

  update() {
    const { content, reasoning, state, error, stats, finish } = this.message;
    const running = state === "running";
    this.node.classList.toggle("running", running);
    this.node.setAttribute("aria-busy", String(running));
    this.reasoning.hidden = !reasoning;
    if (reasoning) {
      this.reasoningTitle.textContent = running && !content ? "Reasoning…" : "Reasoning";
      this.reasoningText.textContent = reasoning;
    }
    this.markdown.show(content);
    this.error.hidden = !error;
    if (error) this.errorText.textContent = error;
    this.copy.hidden = this.again.hidden = running;
    if (!content) this.copy.hidden = true;
    if (error) this.again.hidden = true; // it has a button of its own
    const notes = stats ? [figures(stats)] : [];
    if (state === "stopped") notes.push("stopped");
    if (finish === "length") notes.push("cut at the most tokens");
    if (running && !stats) notes.push("waiting for the first token");
    this.stats.textContent = notes.join(" · ");
  }
}
