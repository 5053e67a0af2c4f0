// Shared by all pages. Texts from outside become text nodes only; nothing here writes HTML.

/** An element: el("p", {class: "note", onclick: f}, "text", child, ...). Strings become text nodes. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "readOnly") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  return add(node, ...children);
}

/** Append children, lists of them and none (null) to a node. */
export function add(node, ...children) {
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const kbd = (key) => el("kbd", { "aria-hidden": "true" }, key);

export function announce(text) {
  document.getElementById("live").textContent = text;
}

/** An id that makes a post count once; works without a secure context, too. */
export function requestId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
}

const csrf = document.querySelector("meta[name=csrf]").content;

export class Refused extends Error {}

/** GET, or POST of `body`. A post whose answer is lost on the way is sent again as it is, with its request id. */
export async function call(path, body, onRetry = () => {}) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: JSON.stringify(body),
  };
  for (let attempt = 0; ; attempt++) {
    let response = null;
    try {
      response = await fetch(path, { ...options, credentials: "same-origin" });
    } catch { /* no server: as good as busy */ }
    if (response === null || response.status === 503) {
      if (attempt >= 8) throw new Refused("The page's server does not answer. What you sent last is not saved yet.");
      onRetry(attempt);
      await new Promise((resolve) => setTimeout(resolve, Math.min(400 * 2 ** attempt, 8000)));
      continue;
    }
    if (response.ok) return response.json();
    const text = await response.text();
    let message = text;
    try {
      message = JSON.parse(text).error;
    } catch { /* plain text */ }
    throw new Refused(message || `The server refused this (${response.status}).`);
  }
}

/** Whether a key press belongs to the field that has the focus. */
export function typing(event) {
  const target = event.target;
  return target.isContentEditable || target.tagName === "TEXTAREA" || target.tagName === "SELECT"
    || (target.tagName === "INPUT" && !["radio", "checkbox", "range", "button"].includes(target.type));
}

/** A row of radio buttons that looks like one control. options: [{value, label, key}]. */
export function choices(legend, name, options, onchange, value = null) {
  const inputs = options.map((option) => el("input", {
    type: "radio", name, value: String(option.value), id: `${name}-${option.value}`, checked: option.value === value,
    onchange: () => onchange(option.value),
  }));
  const labels = options.map((option, i) => el("label", { for: inputs[i].id, class: "choice" }, inputs[i],
    el("span", {}, option.label), option.key ? kbd(option.key) : null));
  const set = el("fieldset", { class: "choices" }, el("legend", {}, legend), el("div", { class: "row" }, labels));
  return {
    node: set,
    choose(chosen) {
      inputs.forEach((input, i) => { input.checked = options[i].value === chosen; });
    },
    enable(on) {
      set.disabled = !on;
    },
  };
}

/** Characters as Python counts them (code points) before the UTF-16 offset. */
export const codePoints = (text, offset) => Array.from(text.slice(0, offset)).length;

/** The prompt; a long one starts folded. */
export function promptBox(text, heading = "Prompt") {
  if (!text) return null;
  const body = el("div", { class: "text" }, text);
  const box = el("section", { class: "prompt", "aria-label": heading }, el("h2", {}, heading), body);
  if (text.length > 900) {
    body.classList.add("folded");
    const more = el("button", {
      type: "button", class: "quiet", "aria-expanded": "false",
      onclick: () => {
        const folded = body.classList.toggle("folded");
        more.setAttribute("aria-expanded", String(!folded));
        more.textContent = folded ? "Show the whole prompt" : "Fold the prompt";
      },
    }, "Show the whole prompt");
    box.append(more);
  }
  return box;
}

/** A field for a reason, which nobody has to give. */
export function noteField(value = "", label = "Why? (optional)") {
  const field = el("textarea", { id: "note", rows: 2, value, maxlength: 5000 });
  return { node: el("div", { class: "note" }, el("label", { for: "note" }, label), field), value: () => field.value.trim() };
}

/** The question of a task; has the focus when the task appears. */
export function heading(task, otherwise) {
  return el("h1", { tabindex: "-1", id: "question" }, task.principle || otherwise);
}
