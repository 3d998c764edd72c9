/**
 * The part of Markdown that models write: paragraphs, headings, lists, quotes, rules, tables, code. It makes DOM
 * nodes from text nodes; there is no way from text to markup. Images are not shown, so that an answer
 * cannot make the browser call another host; links are http(s) only.
 */
import { copyButton, element } from "./dom.js";

// Every pattern and loop here is linear in the text: models do write ten thousand asterisks in a row.
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^[\s|:-]+$/;
const LINK = /\[([^[\]\n]{1,500})\]\((https?:\/\/[^\s()]{1,2000})\)/y;
const DEEPEST = 8;

/** Shows text in a container, again and again as it grows: blocks that did not change keep their nodes. */
export class Markdown {
  #shown = [];

  constructor(container) {
    this.container = container;
  }

  show(text) {
    const blocks = split(text.split("\n"));
    let same = 0;
    while (same < blocks.length && this.#shown[same]?.key === keyOf(blocks[same])) same += 1;
    for (const old of this.#shown.splice(same)) old.node.remove();
    for (const block of blocks.slice(same)) {
      const node = render(block, 0);
      this.container.append(node);
      this.#shown.push({ key: keyOf(block), node });
    }
  }
}

const keyOf = (block) => `${block.kind} ${block.word ?? ""}\n${block.lines.join("\n")}`;

/** The fence and language that open a code block, null where the line does not. */
function fenceOf(line) {
  const fence = FENCE.exec(line)?.[1];
  const word = fence && line.trim().slice(fence.length).trim();
  return fence && !(fence[0] === "`" && word.includes("`")) ? { fence, word } : null;
}

/** Whether a table's head stands at a line: the line after it is its rule. */
const isTable = (lines, at) => {
  const next = lines[at + 1] ?? "";
  return lines[at].includes("|") && TABLE_RULE.test(next) && next.includes("-") && next.includes("|");
};

/** Whether a line begins a list of the other sort than the one whose first line matched ITEM. */
const isOtherList = ([, indent, mark], line) => {
  const match = ITEM.exec(line);
  return match !== null && match[1].length <= indent.length + 1 && /\d/.test(mark) !== /\d/.test(match[2]);
};

const startsBlock = (line) =>
  fenceOf(line) !== null || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || QUOTE.test(line);

/** Lines to blocks {kind, lines, word}. word: a code block's language or a heading's depth. */
function split(lines) {
  const blocks = [];
  let at = 0;
  const take = (kind, more) => {
    const from = at;
    at += 1;
    while (at < lines.length && more(lines[at])) at += 1;
    blocks.push({ kind, lines: lines.slice(from, at) });
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at += 1;
    } else if ((match = fenceOf(line))) {
      const { fence, word } = match;
      const from = at + 1;
      do at += 1;
      while (at < lines.length && !closes(lines[at], fence));
      blocks.push({ kind: "code", lines: lines.slice(from, at), word: word.slice(0, 40) });
      at += 1;
    } else if ((match = HEADING.exec(line))) {
      blocks.push({ kind: "heading", lines: [match[2]], word: match[1].length });
      at += 1;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule", lines: [line] });
      at += 1;
    } else if (QUOTE.test(line)) {
      take("quote", (next) => QUOTE.test(next));
    } else if ((match = ITEM.exec(line))) {
      // A blank line stays inside where an item or an indented line follows.
      take("list", (next) =>
        next.trim()
          ? !isOtherList(match, next) &&
            (ITEM.test(next) || /^\s{2,}/.test(next) || (lines[at - 1].trim() !== "" && !startsBlock(next)))
          : ITEM.test(lines[at + 1] ?? "") || /^\s{2,}\S/.test(lines[at + 1] ?? ""),
      );
    } else if (isTable(lines, at)) {
      take("table", (next) => next.includes("|"));
    } else {
      take("paragraph", (next) => next.trim() && !startsBlock(next) && !isTable(lines, at));
    }
  }
  return blocks;
}

const closes = (line, fence) => {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
};

function render({ kind, lines, word }, depth) {
  if (depth > DEEPEST) return element("p", {}, lines.join("\n"));
  switch (kind) {
    case "code":
      return code(lines.join("\n"), word);
    case "heading":
      return element(`h${Math.min(6, word + 2)}`, {}, inline(lines[0], 0));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, nested(lines.map((line) => QUOTE.exec(line)[1]), depth));
    case "list":
      return list(lines, depth);
    case "table":
      return table(lines);
    default:
      return element("p", {}, inline(lines.join("\n"), 0));
  }
}

const nested = (lines, depth) => split(lines).map((block) => render(block, depth + 1));

function code(text, word) {
  const body = element("pre", { tabIndex: 0 }, element("code", {}, text));
  body.setAttribute("aria-label", word ? `Code, ${word}` : "Code");
  body.setAttribute("role", "group");
  const head = element("div", { className: "code-head" }, element("span", {}, word || "code"));
  head.append(copyButton(() => text, "Copy code"));
  return element("div", { className: "code" }, head, body);
}

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = Number.parseInt(mark, 10);
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= indent.length + 1) {
      items.push({ lines: [match[3]], width: match[0].length - match[3].length });
    } else {
      const { lines: own, width } = items.at(-1);
      const spaces = line.length - line.trimStart().length;
      own.push(line.slice(Math.min(spaces, width)));
    }
  }
  for (const item of items) {
    const [first, ...rest] = split(item.lines);
    const children = first?.kind === "paragraph" ? inline(first.lines.join("\n"), 0) : [];
    if (first && !children.length) rest.unshift(first);
    made.append(element("li", {}, children, rest.map((block) => render(block, depth + 1))));
  }
  return made;
}

function table(lines) {
  const cells = (line) =>
    line
      .trim()
      .replace(/^\||\|$/g, "")
      .split(/(?<!\\)\|/)
      .map((cell) => inline(cell.trim().replaceAll("\\|", "|"), 0));
  const row = (line, tag) => element("tr", {}, cells(line).map((cell) => element(tag, {}, cell)));
  const head = element("thead", {}, row(lines[0], "th"));
  const body = element("tbody", {}, lines.slice(2).map((line) => row(line, "td")));
  return element("div", { className: "table", tabIndex: 0 }, element("table", {}, head, body));
}

/** Text to nodes: code, strong, emphasised, links, escapes; the rest as it is. */
function inline(text, depth) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  const absent = new Set(); // delimiters that do not come any more
  let plain = 0; // where the text begins that is not in nodes yet
  let at = 0;
  const put = (node, end) => {
    if (plain < at) nodes.push(text.slice(plain, at));
    nodes.push(node);
    plain = at = end;
  };
  while (at < text.length) {
    const char = text[at];
    if (char === "\\" && at + 1 < text.length && "\\`*_{}[]()#+-.!|>~".includes(text[at + 1])) {
      put(text[at + 1], at + 2);
    } else if (char === "`" || char === "*") {
      let length = 1;
      while (text[at + length] === char) length += 1;
      const from = at + length;
      const mark = char.repeat(length);
      const end = length > 3 && char === "*" ? -1 : closing(text, mark, from, absent);
      const body = text.slice(from, Math.max(from, end));
      if (end < 0 || !body.trim() || (char === "*" && body !== body.trim())) {
        at = from;
      } else if (char === "`") {
        const padded = body.startsWith(" ") && body.endsWith(" ");
        put(element("code", {}, padded ? body.slice(1, -1) : body), end + length);
      } else {
        const inner = inline(body, depth + 1);
        const node = length === 1 ? element("em", {}, inner) : element("strong", {}, inner);
        put(length === 3 ? element("em", {}, node) : node, end + length);
      }
    } else if (char === "[" && text[at - 1] !== "!") {
      LINK.lastIndex = at;
      const match = LINK.exec(text);
      if (match) {
        const link = { href: match[2], title: match[2], target: "_blank", rel: "noopener noreferrer" };
        put(element("a", link, match[1]), at + match[0].length);
      } else {
        at += 1;
      }
    } else {
      at += 1;
    }
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

/** Where the next run of exactly this mark begins, -1 where none does. */
function closing(text, mark, from, absent) {
  if (absent.has(mark)) return -1;
  let at = text.indexOf(mark, from);
  while (at >= 0) {
    let end = at + mark.length;
    while (text[end] === mark[0]) end += 1;
    if (end - at === mark.length) return at;
    at = text.indexOf(mark, end);
  }
  absent.add(mark);
  return -1;
}
