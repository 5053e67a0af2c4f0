// One function per kind of task: draws it into `root` and returns
// payload() - what to send, throws an Error with words for the rater; draft() - the same, unchecked;
// key(event) - true if the key was for it; keys - [[key, what it does], ...].

import { add, announce, choices, el, heading, kbd, noteField, promptBox } from "./common.js";
import { mountChat } from "./chat.js";
import { mountEdit } from "./edit.js";
import { mountRank } from "./rank.js";

function mountCompare(root, task, before) {
  const names = ["First answer", "Second answer"];
  let choice = before?.choice ?? null, margin = before?.margin ?? null;
  const cards = task.answers.map((answer, i) => el("article", {
    class: "card answer", "aria-label": names[i],
    onclick: () => { if (String(getSelection()) === "") choose(["first", "second"][i]); },
  }, el("h2", {}, names[i]), el("div", { class: "text" }, answer)));
  const which = choices("Which is better?", "choice", [
    { value: "first", label: "First", key: "←" }, { value: "tie", label: "Tie", key: "T" },
    { value: "both_bad", label: "Both bad", key: "B" }, { value: "second", label: "Second", key: "→" },
  ], (value) => choose(value), choice);
  which.node.classList.add("quad");
  const much = choices("By how much, from 1 (barely) to 5 (by far)? (optional)", "margin",
    [1, 2, 3, 4, 5].map((n) => ({ value: n, label: String(n) })), (value) => { margin = value; }, margin);
  much.node.classList.add("scale");
  const note = noteField(before?.note);

  function choose(value) {
    choice = value;
    which.choose(value);
    cards[0].classList.toggle("chosen", value === "first");
    cards[1].classList.toggle("chosen", value === "second");
    const graded = value === "first" || value === "second";
    if (!graded) much.choose(margin = null);
    much.enable(graded);
    announce({ first: "First answer is better", second: "Second answer is better", tie: "Tie", both_bad: "Both bad" }[value] ?? "");
  }
  add(root, heading(task, "Which answer is better?"), promptBox(task.prompt), el("div", { class: "sides" }, cards),
    el("div", { class: "panel controls" }, which.node, much.node, note.node));
  choose(choice);
  return {
    draft: () => ({ choice, margin, note: note.value() }),
    payload() {
      if (!choice) throw new Error("Choose first: the first answer, the second, a tie, or both bad.");
      return { choice, margin, note: note.value() };
    },
    key(event) {
      const key = event.key.toLowerCase();
      const direct = { arrowleft: "first", arrowright: "second", t: "tie", b: "both_bad" }[key];
      if (direct) choose(direct);
      else if (/^[1-5]$/.test(key)) {
        if (choice !== "first" && choice !== "second") {
          announce("Choose an answer before saying by how much");
          return true;
        }
        much.choose(margin = Number(key));
        announce(`by ${margin} of 5`);
      } else return false;
      return true;
    },
    keys: [["←  →", "the first, the second is better"], ["T", "a tie"], ["B", "both are bad"], ["1 – 5", "by how much"]],
  };
}

function mountRate(root, task, before) {
  let value = before?.value ?? null;
  const count = task.high - task.low + 1, buttons = count <= 11;
  const note = noteField(before?.note);
  const keyOf = (n) => (n === 10 && task.low >= 1 ? "0" : n >= 0 && n <= 9 ? String(n) : null);
  let control;
  if (buttons) {
    control = choices(`Score from ${task.low} (worst) to ${task.high} (best)`, "value",
      Array.from({ length: count }, (_, i) => ({ value: task.low + i, label: String(task.low + i) })),
      (chosen) => { value = chosen; }, value);
    control.node.classList.add("scale");
  } else {
    const slider = el("input", { type: "range", id: "slider", min: task.low, max: task.high, "aria-label": "Score, slider" });
    const field = el("input", { type: "number", id: "number", min: task.low, max: task.high, inputmode: "numeric" });
    if (value !== null) slider.value = field.value = value;
    slider.addEventListener("input", () => { field.value = value = Number(slider.value); });
    field.addEventListener("input", () => { value = field.value === "" ? null : Number(field.value); slider.value = field.value; });
    control = {
      node: el("div", { class: "slider" }, el("label", { for: "number" }, `Score from ${task.low} (worst) to ${task.high} (best)`),
        el("div", { class: "row" }, field, slider)),
      choose(chosen) { slider.value = field.value = chosen; },
    };
  }
  add(root, heading(task, "How good is this answer?"), promptBox(task.prompt),
    el("article", { class: "card", "aria-label": "Answer" }, el("h2", {}, "Answer"), el("div", { class: "text" }, task.answers[0])),
    el("div", { class: "panel controls" }, control.node, note.node));
  return {
    draft: () => ({ value, note: note.value() }),
    payload() {
      if (value === null || Number.isNaN(value)) throw new Error(`Give a score from ${task.low} to ${task.high} first.`);
      return { value, note: note.value() };
    },
    key(event) {
      const chosen = Array.from({ length: count }, (_, i) => task.low + i).find((n) => keyOf(n) === event.key);
      if (!buttons || chosen === undefined) return false;
      control.choose(value = chosen);
      announce(`Score ${value}`);
      return true;
    },
    keys: buttons ? [[task.high === 10 && task.low >= 1 ? `${task.low} – 9, 0` : `${task.low} – ${Math.min(9, task.high)}`,
      task.high === 10 ? "the score; 0 is 10" : "the score"]] : [["Tab", "to the score, then type it"]],
  };
}

function mountComment(root, task, before) {
  const field = el("textarea", { id: "comment", rows: 5, value: before?.text ?? "", maxlength: 20000 });
  const boxes = task.labels.map((label, i) => el("input", { type: "checkbox", id: `aspect-${i}`, checked: (before?.aspects ?? []).includes(label) }));
  const aspects = () => task.labels.filter((_, i) => boxes[i].checked);
  add(root, heading(task, "What do you think of this answer?"), promptBox(task.prompt),
    el("article", { class: "card", "aria-label": "Answer" }, el("h2", {}, "Answer"), el("div", { class: "text" }, task.answers[0])),
    el("div", { class: "panel controls" },
      el("div", {}, el("label", { for: "comment" }, "Your comment"), field),
      task.labels.length ? el("fieldset", { class: "choices" }, el("legend", {}, "It is about (optional)"),
        el("div", { class: "row" }, task.labels.map((label, i) => el("label", { class: "choice", for: `aspect-${i}` }, boxes[i],
          el("span", {}, label), i < 5 ? kbd(String(i + 1)) : null)))) : null));
  return {
    focus: field,
    draft: () => ({ text: field.value, aspects: aspects() }),
    payload() {
      if (!field.value.trim()) throw new Error("Write a comment first, or skip and say why.");
      return { text: field.value, aspects: aspects() };
    },
    key(event) {
      const box = boxes[Number(event.key) - 1];
      if (!/^[1-5]$/.test(event.key) || !box) return false;
      box.checked = !box.checked;
      return true;
    },
    keys: [["1 – 5", "what it is about (outside the text field)"]],
  };
}

export const MOUNT = {
  compare: mountCompare, rank: mountRank, rate: mountRate, edit: mountEdit, comment: mountComment, chat: mountChat,
};
