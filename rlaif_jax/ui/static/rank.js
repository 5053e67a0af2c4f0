// Ranking: cards in order, best on top; by drag, by buttons, by keys. Ties and left-out answers are allowed.

import { add, announce, el, heading, noteField, promptBox } from "./common.js";

export function mountRank(root, task, before) {
  // A card: where it was shown, whether it ties with the one above, whether it is left out.
  let cards = task.answers.map((_, place) => ({ place, tie: false, out: false }));
  let touched = false, asked = false, allBad = Boolean(before?.all_bad);
  if (before?.order) {
    const placed = before.order.flatMap((group) => group.map((place, i) => ({ place, tie: i > 0, out: false })));
    const rest = cards.filter((card) => !placed.some((other) => other.place === card.place));
    cards = [...placed, ...rest.map((card) => ({ ...card, out: true }))];
    touched = true;
  }
  const note = noteField(before?.note);
  const list = el("ol", { class: "ranking", "aria-label": "Answers, best first" });
  const bad = el("input", { type: "checkbox", id: "all-bad", checked: allBad, onchange: () => setAllBad(bad.checked) });
  const items = new Map(cards.map((card) => [card.place, item(card.place)]));
  let current = cards[0].place;

  function item(place) {
    const rank = el("span", { class: "rank" });
    const button = (label, sign, act) => el("button", { type: "button", class: "small", "aria-label": label, title: label,
      onclick: () => { current = place; act(); } }, sign);
    const buttons = {
      up: button("Move up", "↑", () => move(place, -1)),
      down: button("Move down", "↓", () => move(place, 1)),
      tie: button("As good as the one above", "=", () => toggle(place, "tie")),
      out: button("Leave out of the order", "✕", () => toggle(place, "out")),
    };
    const rail = el("div", { class: "rail", title: "Drag to order" }, rank, el("span", { class: "grip", "aria-hidden": "true" }, "⠿"));
    const node = el("li", { class: "card", tabindex: "-1", "data-place": place, onfocus: () => { current = place; roving(); } },
      rail, el("div", { class: "body" }, el("div", { class: "text" }, task.answers[place]), el("div", { class: "row tools" }, Object.values(buttons))));
    drag(rail, node, place);
    return { node, rank, buttons };
  }

  const index = (place) => cards.findIndex((card) => card.place === place);

  function roving() {
    for (const [place, { node }] of items) node.tabIndex = place === current ? 0 : -1;
  }

  /** Places by the rule of sport: two firsts, then a third. */
  function ranks() {
    let placed = 0, rank = 0;
    return cards.map((card, i) => {
      if (card.out) return null;
      placed += 1;
      if (!(card.tie && cards.slice(0, i).some((other) => !other.out))) rank = placed;
      return rank;
    });
  }

  function draw(say = "") {
    // The current card stays where it is in the document and the others move around it: it keeps the focus and the drag.
    const pinned = items.get(current).node, at = index(current);
    if (!list.contains(pinned)) list.append(pinned);
    cards.forEach(({ place }, i) => {
      if (i < at) list.insertBefore(items.get(place).node, pinned);
      else if (i > at) list.append(items.get(place).node);
    });
    ranks().forEach((rank, i) => {
      const card = cards[i], { node, rank: shown, buttons } = items.get(card.place);
      shown.textContent = rank === null ? "–" : String(rank);
      node.classList.toggle("out", card.out);
      node.classList.toggle("tied", card.tie && rank !== null && i > 0);
      node.setAttribute("aria-label", rank === null ? "Left out" : `Place ${rank}${card.tie && i > 0 ? ", tied with the one above" : ""}`);
      buttons.tie.setAttribute("aria-pressed", String(card.tie));
      buttons.out.setAttribute("aria-pressed", String(card.out));
      buttons.up.disabled = i === 0;
      buttons.down.disabled = i === cards.length - 1;
      buttons.tie.disabled = i === 0 || card.out;
    });
    list.classList.toggle("muted", allBad);
    roving();
    if (say) announce(say);
  }

  function changed(place) {
    touched = true;
    cards.forEach((card, i) => { if (i === 0) card.tie = false; });
    const rank = ranks()[index(place)];
    draw(rank === null ? "Left out" : `Place ${rank}`);
  }

  function moveTo(place, target) {
    const from = index(place);
    target = Math.max(0, Math.min(cards.length - 1, target));
    if (target === from) return;
    const [card] = cards.splice(from, 1);
    card.tie = false;
    cards.splice(target, 0, card);
    changed(place);
  }

  const move = (place, by) => moveTo(place, index(place) + by);

  function toggle(place, what) {
    const card = cards[index(place)];
    if (what === "tie" && index(place) === 0) return;
    card[what] = !card[what];
    changed(place);
  }

  function setAllBad(value) {
    bad.checked = allBad = value;
    draw(value ? "All are bad" : "Not all are bad");
  }

  function drag(rail, node, place) {
    rail.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      rail.setPointerCapture(event.pointerId);
      node.classList.add("dragged");
      node.focus({ preventScroll: true }); // makes it the current card
      const follow = (moved) => {
        const others = cards.filter((card) => card.place !== place);
        const target = others.filter(({ place: other }) => {
          const box = items.get(other).node.getBoundingClientRect();
          return box.top + box.height / 2 < moved.clientY;
        }).length;
        if (target !== index(place)) moveTo(place, target);
        if (moved.clientY < 60) scrollBy(0, -14);
        if (moved.clientY > innerHeight - 60) scrollBy(0, 14);
      };
      const end = () => {
        node.classList.remove("dragged");
        rail.removeEventListener("pointermove", follow);
      };
      rail.addEventListener("pointermove", follow);
      rail.addEventListener("lostpointercapture", end, { once: true });
      rail.addEventListener("pointerup", end, { once: true });
      rail.addEventListener("pointercancel", end, { once: true });
    });
  }

  add(root, heading(task, "Put the answers in order"), promptBox(task.prompt),
    el("p", { class: "soft" }, "Best on top. Drag by the number, use the buttons, or the keys: arrows, Shift and arrows, 1 to 9."), list,
    el("div", { class: "panel controls" }, el("label", { class: "plain", for: "all-bad" }, bad, " None of them is acceptable"), note.node));
  draw();

  const groups = () => {
    const found = [];
    ranks().forEach((rank, i) => {
      if (rank === null) return;
      if (i > 0 && found.length && ranks().slice(0, i).includes(rank)) found.at(-1).push(cards[i].place);
      else found.push([cards[i].place]);
    });
    return found;
  };
  return {
    draft: () => (touched || allBad ? { order: groups(), all_bad: allBad, note: note.value() } : { note: note.value() }),
    payload() {
      if (!allBad && groups().flat().length < 2) throw new Error("Place at least two answers, or skip and say why.");
      if (!touched && !allBad && !asked) {
        asked = true;
        throw new Error("This is the order in which they were shown. If it is also your order, send it again.");
      }
      return { order: groups(), all_bad: allBad, note: note.value() };
    },
    key(event) {
      const key = event.key.toLowerCase();
      if (key === "arrowup" || key === "arrowdown") {
        const by = key === "arrowup" ? -1 : 1, inside = list.contains(document.activeElement);
        if (event.shiftKey || event.altKey) move(current, by);
        else current = cards[inside ? Math.max(0, Math.min(cards.length - 1, index(current) + by)) : 0].place;
        items.get(current).node.focus();
      } else if (/^[1-9]$/.test(key)) {
        if (Number(key) > cards.length) return false;
        touched = true;
        moveTo(current, Number(key) - 1);
        items.get(current).node.focus();
      } else if (key === "t") toggle(current, "tie");
      else if (key === "x") toggle(current, "out");
      else if (key === "b") setAllBad(!allBad);
      else return false;
      return true;
    },
    keys: [["↑  ↓", "go to another answer"], ["Shift ↑ ↓", "move it"], ["1 – 9", "move it to that place"],
      ["T", "as good as the one above"], ["X", "leave it out"], ["B", "none is acceptable"]],
  };
}
