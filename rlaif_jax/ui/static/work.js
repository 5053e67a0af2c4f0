// A rater's work: instructions with a check, then task after task.

import { add, announce, call, choices, el, kbd, requestId, typing } from "./common.js";
import { MOUNT } from "./forms.js";

const $ = (id) => document.getElementById(id);
const me = await call("/api/me");
let view = null, task = null, revealed = null, sending = false;
let seconds = 0, active = Date.now();

// ---- Time spent: counted while the page is visible and something moved within the last minute

for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "scroll"]) {
  addEventListener(kind, () => { active = Date.now(); }, { passive: true });
}
setInterval(() => {
  if (document.visibilityState === "visible" && Date.now() - active < 60_000) seconds += 0.25;
}, 250);

// ---- Display

function show(section) {
  for (const name of ["intro", "task", "done"]) $(name).hidden = name !== section;
  document.body.dataset.done = section === "intro" ? "" : $("bar").value; // the number of tasks that were done before this screen
  $("actions").hidden = section === "intro";
}

function notice(text, good = false) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  $("notice").classList.toggle("bad", !good);
  if (text) $("notice").scrollIntoView({ block: "nearest" });
}

function progress({ answered, skipped, left }) {
  const done = answered + skipped, all = Math.max(done + left, 1);
  $("bar").max = all;
  $("bar").value = done;
  $("count").textContent = `${done} of ${done + left} done${skipped ? `, ${skipped} of them skipped` : ""}`;
  $("undo").disabled = done === 0;
}

const draftKey = () => `draft-${me.rater}-${task.id}`;

function keepDraft() {
  if (view && task) sessionStorage.setItem(draftKey(), JSON.stringify(view.draft()));
}

function showTask(next) {
  task = next;
  revealed = null;
  seconds = 0;
  $("task").replaceChildren();
  const kept = sessionStorage.getItem(draftKey());
  const before = kept ? JSON.parse(kept) : task.before?.skip === undefined ? task.before : null;
  view = MOUNT[task.kind]($("task"), task, before, notice);
  $("submit").replaceChildren(task.kind === "chat" ? "Finish " : "Send ", kbd(view.focus ? "Ctrl Enter" : "Enter"));
  $("skip-button").hidden = false;
  show("task");
  scrollTo(0, 0);
  $("question").focus({ preventScroll: true });
}

function showDone() {
  task = view = null;
  $("done").replaceChildren(el("h1", { tabindex: "-1", id: "question" }, "Nothing to do for now"),
    el("p", {}, "Everything you sent is saved. New tasks appear here by themselves."));
  $("submit").replaceChildren("Look again ", kbd("Enter"));
  $("skip-button").hidden = true;
  show("done");
  $("question").focus();
}

async function next(quiet = false) {
  const found = await call("/api/next", {});
  progress(found.progress);
  if (found.task) showTask(found.task);
  else if (!quiet || $("done").hidden) showDone();
}

function reveal(suggestion) {
  sessionStorage.removeItem(draftKey());
  view = null;
  revealed = suggestion;
  add($("task"), el("section", { class: "panel reveal", tabindex: "-1", id: "reveal" }, el("h2", {}, "What the AI judge said"),
    el("p", {}, el("b", {}, suggestion.judge), ": ", suggestion.says),
    el("p", { class: "soft" }, "Your answer is saved. If you change your mind now, undo it; the record will note that you had seen this suggestion.")));
  for (const control of $("task").querySelectorAll("input, textarea, button, select")) control.disabled = true;
  $("submit").replaceChildren("Next ", kbd("Enter"));
  $("skip-button").hidden = true;
  $("reveal").focus();
  $("reveal").scrollIntoView({ block: "center" });
}

// ---- Actions

/** Run one action at a time; its failure becomes a notice. */
async function once(action) {
  if (sending) return;
  sending = true;
  document.body.classList.add("sending");
  try {
    notice("");
    await action();
  } catch (error) {
    notice(error.message);
  } finally {
    sending = false;
    document.body.classList.remove("sending");
  }
}

/** The post of an answer, with one id for as long as it says the same: sent twice, it counts once. */
let pending = null;
async function post(content) {
  const text = JSON.stringify([task.id, content]);
  if (pending?.text !== text) pending = { text, request: requestId(), seconds: Math.round(seconds * 10) / 10 };
  const body = { request: pending.request, task: task.id, seconds: pending.seconds, ...content };
  const found = await call("/api/answer", body, () => notice("Not saved yet: the server does not answer. Trying again …"));
  pending = null;
  notice("");
  progress(found.progress);
  announce("Saved. " + $("count").textContent);
  return found;
}

const submit = () => once(async () => {
  if (revealed || !task) return next();
  keepDraft();
  const found = await post({ payload: view.payload() });
  sessionStorage.removeItem(draftKey());
  if (found.suggestion) reveal(found.suggestion);
  else await next();
});

const undo = () => once(async () => {
  const found = await call("/api/undo", { request: requestId() });
  progress(found.progress);
  sessionStorage.removeItem(`draft-${me.rater}-${found.task.id}`);
  showTask(found.task);
  notice("Taken back. Change it and send it again.", true);
});

// ---- Dialogs

const REASONS = ["I cannot tell", "Not my topic", "The text is broken", "I do not want to read this", "Other"];
let reason = REASONS[0];
const why = el("input", { type: "text", id: "why", maxlength: 500 });
const reasons = choices("Why?", "reason", REASONS.map((text, i) => ({ value: text, label: text, key: String(i + 1) })), (chosen) => { reason = chosen; }, reason);
const skipNow = () => once(async () => {
  const words = why.value.trim();
  await post({ skip: words ? `${reason}: ${words}` : reason });
  sessionStorage.removeItem(draftKey());
  $("skip").close();
  await next();
});
add($("skip"), el("h2", { id: "skip-title" }, "Skip this task"), reasons.node,
  el("div", {}, el("label", { for: "why" }, "In your words (optional)"), why),
  el("div", { class: "row end" }, el("button", { type: "button", onclick: () => $("skip").close() }, "Back ", kbd("Esc")),
    el("button", { type: "button", class: "main", id: "skip-now", onclick: skipNow }, "Skip ", kbd("Enter"))));

function openSkip() {
  if (!task || revealed || sending) return;
  why.value = "";
  reasons.choose(reason = REASONS[0]);
  $("skip").showModal();
}

function openHelp() {
  const rows = [...(view?.keys ?? []), ["Enter", "send, go on"], ["S", "skip, with a reason"], ["U", "undo your last answer"], ["?", "these keys"]];
  $("help").replaceChildren(el("h2", { id: "help-title" }, "Keys"),
    el("dl", { class: "keys" }, rows.map(([keys, what]) => el("div", {}, el("dt", {}, kbd(keys), el("span", { class: "unseen" }, keys)), el("dd", {}, what)))),
    el("div", { class: "row end" }, el("button", { type: "button", class: "main", onclick: () => $("help").close() }, "Close")));
  $("help").showModal();
}

add($("actions"), 
  el("button", { type: "button", id: "undo", onclick: undo }, "Undo ", kbd("U")),
  el("button", { type: "button", id: "skip-button", onclick: openSkip }, "Skip ", kbd("S")),
  el("button", { type: "button", id: "help-button", "aria-label": "Keys", onclick: openHelp }, "?"),
  el("button", { type: "button", id: "submit", class: "main", onclick: submit }, "Send"));

// ---- Keys

addEventListener("keydown", (event) => {
  if (event.isComposing || event.defaultPrevented) return;
  if ($("skip").open) {
    if (event.key === "Enter" && event.target.tagName !== "BUTTON") skipNow();
    else if (/^[1-5]$/.test(event.key) && !typing(event)) reasons.choose(reason = REASONS[Number(event.key) - 1]);
    else return;
    event.preventDefault();
    return;
  }
  if ($("help").open || $("actions").hidden) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
    return;
  }
  if (event.ctrlKey || event.metaKey) return;
  if (typing(event)) {
    if (event.key === "Enter" && event.target.type === "number") submit();
    else if (event.key === "Escape") {
      event.target.blur();
      $("question").focus({ preventScroll: true });
    }
    return;
  }
  if (event.altKey && !event.key.startsWith("Arrow")) return;
  // A button or link handles Enter itself; a group of radio buttons also handles the arrows.
  const own = event.target.closest?.("button, a, summary");
  const radio = event.target.tagName === "INPUT" && event.key.startsWith("Arrow");
  if (event.key === "Enter" && !own) submit();
  else if (event.key === "?") openHelp();
  else if (event.key.toLowerCase() === "u") undo();
  else if (event.key.toLowerCase() === "s") openSkip();
  else if (radio || !view || !view.key(event)) return;
  event.preventDefault();
});
addEventListener("pagehide", keepDraft);

// ---- The check

function showCheck() {
  const given = me.check.map(() => null);
  const whys = me.check.map(() => el("p", { class: "notice bad", hidden: true, role: "alert" }));
  const sets = me.check.map((q, i) => choices(q.question, `check-${i}`, q.options.map((label, value) => ({ value, label })), (value) => { given[i] = value; }));
  const send = () => once(async () => {
    if (given.includes(null)) throw new Error("Answer every question first.");
    const { passed, wrong } = await call("/api/check", { answers: given });
    whys.forEach((node, i) => {
      const found = wrong.find((w) => w.index === i);
      node.hidden = !found;
      node.textContent = found ? `Not quite. ${found.why}` : "";
    });
    if (passed) await next();
  });
  add($("check"), el("h2", {}, "A short check"), sets.map((set, i) => [set.node, whys[i]]),
    el("div", { class: "row end" }, el("button", { type: "button", class: "main", id: "begin", onclick: send }, "Begin")));
  show("intro");
}

progress(me.progress);
if (!me.passed) showCheck();
else await once(() => next());
setInterval(() => { // new tasks of a run that waits
  if (!$("done").hidden && document.visibilityState === "visible" && !sending) next(true).catch(() => {});
}, 3000);
