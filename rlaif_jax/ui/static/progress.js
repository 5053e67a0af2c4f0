// Who still has to do what, how far raters agree; for the coordinator: stop the run.

import { call, el } from "./common.js";

const $ = (id) => document.getElementById(id);
const coordinator = "coordinator" in $("team").dataset;

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  $("notice").classList.add("bad");
}

const percent = (share) => `${Math.round(100 * share)} %`;
const minutes = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);

function table(caption, heads, rows) {
  return el("div", { class: "wide" }, el("table", {}, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, cell)))))));
}

async function show() {
  const team = await call("/api/team");
  const kinds = table("Tasks", ["What", "Tasks", "Answers", ""], team.groups.map((g) => [
    g.origin ? `${g.kind}, ${g.origin}` : g.kind, String(g.tasks), `${g.answers} of ${g.wanted}`,
    el("progress", { max: g.wanted, value: g.answers, "aria-label": `${g.kind}: ${g.answers} of ${g.wanted} answers` }),
  ]));
  const raters = table("Raters", ["Who", "Done", "Skipped", "Can still do", "In hand", "Time", "Each"], team.raters.map((r) => [
    el("span", {}, r.rater, r.simulated ? [" ", el("span", { class: "pill" }, "simulated")] : null), String(r.answered), String(r.skipped),
    String(r.left), String(r.in_hand), minutes(r.seconds), r.answered ? minutes(r.seconds / r.answered) : "–",
  ]));
  const agreement = team.agreement.length
    ? table("Agreement", ["Kind", "Judged twice or more", "Same verdict", "Krippendorff's alpha"], team.agreement.map((a) => [
      a.kind, String(a.units), percent(a.same), a.alpha === null ? "–" : a.alpha.toFixed(2)]))
    : el("p", { class: "soft" }, "Agreement shows here once two raters have answered the same task.");
  const stuck = team.stuck ? el("p", { class: "notice warn" }, `${team.stuck} task${team.stuck === 1 ? "" : "s"} cannot be finished: every rater has answered or skipped ${team.stuck === 1 ? "it" : "them"}. Add a rater.`) : null;
  const uncounted = team.uncounted ? el("p", { class: "soft" }, `${team.uncounted} answers are not counted in it yet; they follow by themselves.`) : null;
  $("team").replaceChildren(...[stuck, kinds, raters, agreement, uncounted].filter(Boolean));
  if (coordinator) {
    $("stopped").hidden = !team.stopped;
    $("stop").textContent = team.stopped ? "Take it back, go on" : "Good enough, stop";
    $("stop").dataset.stopped = team.stopped ? "yes" : "";
  }
}

async function stop(value) {
  try {
    await call("/api/stop", { stop: value });
    await show();
  } catch (error) {
    notice(error.message);
  }
}

if (coordinator) {
  $("stop").addEventListener("click", () => ($("stop").dataset.stopped ? stop(false) : $("sure").showModal()));
  $("no").addEventListener("click", () => $("sure").close());
  $("yes").addEventListener("click", () => {
    $("sure").close();
    stop(true);
  });
}
const refresh = () => show().then(() => notice(""), (error) => notice(error.message));
await refresh();
setInterval(() => { if (document.visibilityState === "visible") refresh(); }, 5000);
