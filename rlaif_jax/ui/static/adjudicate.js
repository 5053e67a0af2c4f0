// The coordinator decides where raters disagree.

import { add, announce, call, el, requestId } from "./common.js";
import { MOUNT } from "./forms.js";

const root = document.getElementById("task"), note = document.getElementById("notice");
let pending = null, later = 0;

function notice(text) {
  note.textContent = text;
  note.hidden = !text;
  note.classList.add("bad");
}

async function show() {
  const { disputes, count } = await call(`/api/disputes?skip=${later}`);
  root.replaceChildren();
  if (!disputes.length) {
    add(root, el("p", { id: "none" }, "No open disagreement."));
    return;
  }
  const { task, opinions } = disputes[0];
  add(root, el("p", { class: "soft" }, `${count} to decide`));
  const opinion = el("section", { class: "panel", "aria-label": "What the raters said" }, el("h2", {}, "What the raters said"),
    el("ul", { class: "opinions" }, opinions.map((o) => el("li", {}, el("b", {}, o.rater), ": ", o.says))));
  const place = el("div", { class: "form" });
  const view = MOUNT[task.kind](place, task, null, notice);
  const decide = async () => {
    try {
      const payload = view.payload(), text = JSON.stringify([task.id, payload]);
      if (pending?.text !== text) pending = { text, request: requestId() };
      await call("/api/adjudicate", { request: pending.request, task: task.id, payload });
      notice("");
      announce("Saved");
      await show();
      document.getElementById("main").focus();
    } catch (error) {
      notice(error.message);
    }
  };
  add(root, opinion, place, el("div", { class: "actions" },
    count > 1 ? el("button", { type: "button", id: "later", onclick: () => { later++; show().catch((error) => notice(error.message)); } }, "Later") : null,
    el("button", { type: "button", class: "main", id: "decide", onclick: decide }, "This holds")));
}

show().catch((error) => notice(error.message));
