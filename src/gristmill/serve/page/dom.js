/** An element with properties and children (nodes, texts, arrays of them); texts become text nodes, never markup. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  for (const child of children.flat()) made.append(child); // spreading many would overflow the stack
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Copies text. The clipboard API exists on https and localhost only; elsewhere the old way does. */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const before = document.activeElement;
  const area = element("textarea", { value: text, className: "hidden", readOnly: true });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!done) throw new Error("the browser did not copy");
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(text, label = "Copy") {
  const button = element("button", { type: "button", className: "quiet" }, "Copy");
  button.setAttribute("aria-label", label);
  button.addEventListener("click", async () => {
    try {
      await copy(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not copied";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}
