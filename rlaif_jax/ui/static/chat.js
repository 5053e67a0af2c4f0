// Talking to the model and rating its turns.

import { add, announce, call, choices, el, heading, noteField, requestId } from "./common.js";

export function mountChat(root, task, before, busy) {
  let turns = task.turns, sending = null;
  const judged = new Map((before?.turns ?? []).map((turn) => [turn.turn, { value: turn.value ?? null, comment: turn.comment ?? "" }]));
  const log = el("ol", { class: "chat", "aria-label": "Conversation" });
  const field = el("textarea", { id: "message", rows: 2, maxlength: 4000 });
  const send = el("button", { type: "button", onclick: () => say() }, "Send ");
  const note = noteField(before?.note, "About the whole conversation (optional)");
  const drawn = new Map();

  const of = (i) => {
    if (!judged.has(i)) judged.set(i, { value: null, comment: "" });
    return judged.get(i);
  };

  function reply(i, text) {
    const scale = choices(`Rate this reply from ${task.low} to ${task.high}`, `turn-${i}`,
      Array.from({ length: task.high - task.low + 1 }, (_, k) => ({ value: task.low + k, label: String(task.low + k) })),
      (value) => { of(i).value = value; }, of(i).value);
    scale.node.classList.add("scale");
    const comment = el("input", { type: "text", id: `comment-${i}`, maxlength: 4000, value: of(i).comment, placeholder: "Comment on this reply (optional)", "aria-label": "Comment on this reply", oninput: (event) => { of(i).comment = event.target.value; } });
    return { node: el("li", { class: "card model" }, el("h2", {}, "Model"), el("div", { class: "text" }, text), scale.node, comment), scale };
  }

  function draw() {
    turns.forEach((turn, i) => {
      if (!drawn.has(`u${i}`)) {
        const node = el("li", { class: "card me" }, el("h2", {}, "You"), el("div", { class: "text" }, turn.message));
        drawn.set(`u${i}`, node);
        log.append(node);
      }
      if (turn.reply !== null && !drawn.has(`m${i}`)) {
        const made = reply(i, turn.reply);
        drawn.set(`m${i}`, made);
        drawn.get(`u${i}`).after(made.node);
      }
    });
  }

  async function say() {
    const message = field.value.trim();
    if (!message || send.disabled) return;
    // The same message sent again after a failure has the same id, so it counts once.
    if (sending?.message !== message) sending = { message, request: requestId() };
    send.disabled = field.readOnly = true;
    send.textContent = "The model is writing …";
    busy("");
    try {
      turns = (await call("/api/say", { request: sending.request, task: task.id, message })).turns;
      field.value = "";
      sending = null;
      draw();
      announce(`The model says: ${turns.at(-1).reply}`);
    } catch (error) {
      busy(error.message);
    } finally {
      send.disabled = field.readOnly = false;
      send.textContent = "Send";
      field.focus();
      field.scrollIntoView({ block: "nearest" });
    }
  }

  send.textContent = "Send";
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing) {
      event.preventDefault();
      say();
    }
  });
  add(root, heading(task, "Talk to the model and rate its replies"),
    task.prompt ? el("section", { class: "prompt" }, el("h2", {}, "What to talk about"), el("div", { class: "text" }, task.prompt)) : null, log,
    el("div", { class: "panel controls" }, el("div", {}, el("label", { for: "message" }, "Your message"), field, el("div", { class: "row" }, send,
      el("span", { class: "soft" }, "Enter sends, Shift Enter makes a new line"))), note.node));
  draw();
  const draft = () => ({
    turns: [...judged].filter(([, j]) => j.value !== null || j.comment.trim()).map(([turn, j]) => ({ turn, value: j.value, comment: j.comment.trim() })),
    note: note.value(),
  });
  return {
    focus: field,
    draft,
    payload() {
      const found = draft();
      if (!found.turns.length) throw new Error("Rate at least one reply first, or skip and say why.");
      return found;
    },
    key(event) {
      const value = Number(event.key), last = turns.findLastIndex((turn) => turn.reply !== null);
      if (!/^[0-9]$/.test(event.key) || value < task.low || value > task.high || last < 0) return false;
      of(last).value = value;
      drawn.get(`m${last}`).scale.choose(value);
      announce(`Rated ${value}`);
      return true;
    },
    keys: [["Enter", "in the message: send it"], ["Esc", "leave the text field"], ["1 – 5", "rate the newest reply"], ["Ctrl Enter", "finish the conversation"]],
  };
}
