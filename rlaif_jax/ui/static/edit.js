// Correcting: rewrite the answer with a live difference, mark passages of the original; by mouse or keys.

import { add, announce, codePoints, el, heading, noteField, promptBox } from "./common.js";
import { diff, words } from "./diff.js";

const SEVERITY = [[-1, "small fault"], [-2, "fault"], [-3, "grave fault"], [1, "good"]];

export function mountEdit(root, task, before) {
  const original = task.answers[0], plain = original.replace(/\r\n?/g, "\n"); // a text field converts line ends
  const field = el("textarea", { id: "edited", rows: 8, spellcheck: "true", value: before?.edited ?? original });
  const changes = el("div", { class: "text diff", "aria-label": "Changes" });
  const summary = el("p", { class: "soft", role: "status" });
  const note = noteField(before?.note);
  const marker = markPassages(original, task.labels, before?.spans ?? []);
  let timer = 0;

  function show() {
    const parts = diff(plain, field.value);
    changes.replaceChildren(...parts.map(([kind, text]) => (kind === "same" ? document.createTextNode(text)
      : el(kind === "new" ? "ins" : "del", {}, text))));
    const count = (kind) => parts.filter(([k]) => k === kind).reduce((n, [, text]) => n + words(text).filter((w) => w.trim()).length, 0);
    const gone = count("gone"), fresh = count("new");
    summary.textContent = field.value === plain ? "Nothing changed yet. If you send it now, your record says that nothing needs to change."
      : gone || fresh ? `${gone} removed, ${fresh} added (words and signs)` : "only blanks changed";
  }
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(show, 120);
  });
  add(root, heading(task, "Correct this answer"), promptBox(task.prompt),
    el("div", { class: "sides" },
      el("div", { class: "card" }, el("h2", {}, el("label", { for: "edited" }, "Your version")), field,
        el("div", { class: "row" }, el("button", { type: "button", class: "quiet", onclick: () => { field.value = plain; show(); field.focus(); } }, "Back to the original"))),
      el("div", { class: "card" }, el("h2", {}, "Changes"), changes, summary)),
    marker.node, el("div", { class: "panel controls" }, note.node));
  show();
  const draft = () => {
    const unchanged = field.value === plain, spans = marker.spans();
    return { edited: unchanged && spans.length ? null : unchanged ? original : field.value, spans, note: note.value() };
  };
  return {
    focus: field,
    draft,
    payload: draft,
    key: marker.key,
    keys: [["Esc", "leave the text field"], ["←  →", "in the original: word by word; with Shift: select"], ["M", "mark the selected words"], ["Ctrl Enter", "send, also from the text field"]],
  };
}

/** The original as words that can be selected and marked. Offsets are of code points towards the outside. */
function markPassages(text, labels, given) {
  const utf16 = (points) => Array.from(text).slice(0, points).join("").length;
  let marks = given.map((span) => ({ ...span, start: utf16(span.start), end: utf16(span.end) }));
  const tokens = [];
  let position = 0;
  for (const word of words(text)) {
    if (word.trim()) tokens.push([position, position + word.length]);
    position += word.length;
  }
  let cursor = 0, anchor = 0, selection = null;
  const area = el("div", { class: "text words", tabindex: "0", role: "group", "aria-label": "The original answer. Arrow keys go word by word, Shift selects, M marks." });
  const severity = el("select", { id: "severity" }, SEVERITY.map(([value, name]) => el("option", { value }, name)));
  const kind = labels.length ? el("select", { id: "kind" }, el("option", { value: "" }, "no kind"), labels.map((label) => el("option", { value: label }, label))) : null;
  const button = el("button", { type: "button", onclick: () => mark() }, "Mark the selection ", el("kbd", { "aria-hidden": "true" }, "M"));
  const list = el("ul", { class: "marks" });

  function draw() {
    const cuts = new Set([0, text.length, ...tokens.flat(), ...marks.flatMap((m) => [m.start, m.end]), ...(selection ?? [])]);
    const edges = [...cuts].sort((a, b) => a - b);
    area.replaceChildren(...edges.slice(1).map((end, i) => {
      const start = edges[i], on = marks.filter((m) => m.start <= start && end <= m.end);
      const selected = selection && selection[0] <= start && end <= selection[1];
      const classes = [on.length && (on.some((m) => m.value < 0) ? "fault" : "good"), selected && "selected"].filter(Boolean);
      return el("span", { "data-start": start, class: classes.join(" ") || null }, text.slice(start, end));
    }));
    list.replaceChildren(...marks.map((m, i) => el("li", {},
      el("span", { class: m.value < 0 ? "fault" : "good" }, text.slice(m.start, m.end).slice(0, 80)),
      ` ${SEVERITY.find(([value]) => value === m.value)?.[1] ?? m.value}${m.category ? `, ${m.category}` : ""} `,
      el("button", { type: "button", class: "quiet", "aria-label": `Remove the mark of ${text.slice(m.start, m.end).slice(0, 40)}`, onclick: () => { marks.splice(i, 1); draw(); } }, "remove"))));
    button.disabled = !selection;
  }

  function mark() {
    if (!selection) return;
    const [start, end] = selection;
    marks.push({ start, end, value: Number(severity.value), category: kind?.value ?? "" });
    marks.sort((a, b) => a.start - b.start || a.end - b.end);
    selection = null;
    getSelection().removeAllRanges();
    draw();
    announce(`Marked: ${text.slice(start, end).slice(0, 80)}`);
  }

  /** UTF-16 offset in the text of a point of the document's selection. */
  function offset(node, inside) {
    const span = node.nodeType === Node.TEXT_NODE ? node.parentElement : node.children?.[inside] ?? node;
    return span?.dataset?.start === undefined ? null : Number(span.dataset.start) + (node.nodeType === Node.TEXT_NODE ? inside : 0);
  }
  /** What the document's selection holds of the text, as [start, end]; null if nothing. */
  function chosen() {
    const { isCollapsed, anchorNode, anchorOffset, focusNode, focusOffset } = getSelection();
    if (isCollapsed || !area.contains(anchorNode) || !area.contains(focusNode)) return null;
    const ends = [offset(anchorNode, anchorOffset), offset(focusNode, focusOffset)];
    return ends.includes(null) || ends[0] === ends[1] ? null : ends.sort((a, b) => a - b);
  }
  // A mouse selection ends when the button is up. A finger drags the selection's handles, which makes no pointer event:
  // then the selection is followed, and the text is drawn again only when it is gone, because drawing removes the handles.
  let mouse = false, followed = false;
  area.addEventListener("pointerdown", (event) => { mouse = event.pointerType === "mouse"; });
  area.addEventListener("pointerup", () => {
    const ends = mouse ? chosen() : null;
    if (!ends) return;
    selection = ends;
    getSelection().removeAllRanges();
    draw();
  });
  function follow() {
    if (!area.isConnected) {
      document.removeEventListener("selectionchange", follow);
      return;
    }
    const ends = mouse ? null : chosen();
    if (ends) {
      selection = ends;
      button.disabled = false;
    } else if (followed) draw();
    followed = ends !== null;
  }
  document.addEventListener("selectionchange", follow);
  area.addEventListener("focus", () => {
    if (!selection && tokens.length && area.matches(":focus-visible")) {
      selection = [...tokens[cursor]];
      draw();
    }
  });

  function key(event) {
    if (event.key.toLowerCase() === "m" && selection) {
      mark();
      return true;
    }
    if (document.activeElement !== area || !tokens.length) return false;
    const last = tokens.length - 1;
    const target = { ArrowLeft: cursor - 1, ArrowRight: cursor + 1, Home: 0, End: last }[event.key];
    if (target === undefined) return false;
    cursor = Math.max(0, Math.min(last, target));
    if (!event.shiftKey) anchor = cursor;
    selection = [tokens[Math.min(anchor, cursor)][0], tokens[Math.max(anchor, cursor)][1]];
    draw();
    announce(text.slice(...selection).slice(0, 120));
    return true;
  }

  draw();
  return {
    node: el("section", { class: "panel", "aria-label": "Mark passages" },
      el("h2", {}, "Mark passages of the original (optional)"), area,
      el("div", { class: "row" }, el("span", { class: "pair" }, el("label", { for: "severity" }, "as a"), severity),
        kind ? el("span", { class: "pair" }, el("label", { for: "kind" }, "kind"), kind) : null, button), list),
    spans: () => marks.map((m) => ({ ...m, start: codePoints(text, m.start), end: codePoints(text, m.end) })),
    key,
  };
}
