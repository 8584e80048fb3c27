// What the panel shows of a status object (docs/status.md), section by section.
//
// Runs in: ComfyUI's page. A section is made anew only when what it shows has changed, so that
// screen readers, selections and the keyboard's focus are left alone.

import { h, plain } from "./elements.js";
import { grid, HISTORY_S, sparkline } from "./pictures.js";

const SCHEMA = 1; // of the status object

const STAGES = { starting: "the ranks start", loading: "the ranks load the model" };

const now = () => performance.now() / 1000;
const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const note = (...text) => h("p", { class: "xdit-note" }, ...text);

/** In words that change seldom: what shows them is made anew then. */
function ago(seconds) {
  const units = [[86400, "day"], [3600, "hour"], [60, "minute"]];
  const unit = units.find(([length]) => seconds >= length);
  return unit ? `${plural(Math.floor(seconds / unit[0]), unit[1])} ago` : "just now";
}

function progress(label, value, max) {
  return h("progress", { "aria-label": label, value: max ? value : null, max: max || null });
}

function table(rows) {
  const cells = ([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))];
  return h("dl", {}, ...rows.flatMap(cells));
}

/** The memory of a rank's device: what is used, and a mark at what is planned. */
function memoryBar({ total_bytes: total, used_bytes: used, planned_bytes: planned }, text) {
  const width = (bytes) => `${(100 * Math.min(bytes / total, 1)).toFixed(1)}%`;
  const meter = { role: "meter", "aria-label": "memory", "aria-valuetext": text };
  const range = { "aria-valuemin": 0, "aria-valuenow": used, "aria-valuemax": total };
  return h(
    "div",
    { class: "xdit-memory", ...meter, ...range },
    h("span", { class: "xdit-used", style: `width: ${width(used)}` }),
    planned && h("span", { class: "xdit-planned", style: `left: ${width(planned)}` }),
  );
}

function rankItem(rank, history, at) {
  const { total_bytes: total, used_bytes: used, planned_bytes: planned } = rank.memory;
  const hasMemory = total !== null && used !== null;
  const plan = planned ? `, ${gib(planned)} planned` : "";
  const text = hasMemory ? `${gib(used)} of ${gib(total)} GiB${plan}` : "";
  const name = [...new Set([rank.device, rank.name])].join(", ");
  return h(
    "li",
    {},
    h(
      "div",
      { class: "xdit-row" },
      h("strong", {}, `rank ${rank.rank}`),
      h("span", { class: "xdit-name", title: name }, name),
      h("span", {}, rank.state),
    ),
    hasMemory && memoryBar(rank.memory, text),
    sparkline(history, at),
    h(
      "div",
      { class: "xdit-row xdit-note" },
      h("span", { class: "xdit-name" }, text),
      h("span", {}, `${Math.round(100 * rank.busy_share)} % busy`),
    ),
  );
}

function ranksList({ ranks, at }, { history }) {
  return h("ul", {}, ...ranks.map((rank) => rankItem(rank, history.of(rank.rank), at)));
}

/** What is under way: workers that start, a model that is loaded, a sampling run. */
function underWay({ start, run }) {
  const begun = start && STAGES[start.stage];
  const of = run?.steps ? ` of ${run.steps}` : "";
  const step = run?.step ? `step ${run.step}${of}` : "sampling";
  return [
    start && [note(`${begun}, ${Math.round(start.seconds)} s`), progress(begun)],
    run && [note(run.plan ? `${step}, ${run.plan}` : step), progress("steps", run.step, run.steps)],
  ].flat();
}

function planPicture({ strategy, world_size: worldSize, degrees, why }) {
  return [grid(degrees), note(`${strategy} on ${plural(worldSize, "rank")}: ${why}`)];
}

function measured({ speedup, verdicts }, { measureAgain }) {
  const ways = ({ model, size, taken, told, paces }) => [
    note(`${model}, ${size}: ${taken} is taken, measured ${told}`),
    table(paces.map(([way, ms]) => [way === "one" ? "ComfyUI alone" : way, `${ms} ms`])),
  ];
  return [
    speedup && h("p", {}, h("strong", {}, `${speedup}x`), " of ComfyUI alone"),
    ...verdicts.flatMap(ways),
    h("button", { type: "button", click: measureAgain }, "Measure again"),
  ];
}

function measuredOf({ speedup, verdicts }) {
  if (!verdicts?.length) return null;
  const shown = verdicts.map(({ model, size, taken, age_s: age, paces }) => ({
    ...{ model, size, taken, told: ago(age) },
    paces: Object.entries(paces).map(([way, pace]) => [way, Math.round(1000 * pace.fastest_s)]),
  }));
  return { speedup: speedup && speedup.value.toFixed(2), verdicts: shown };
}

function fallBacks(reasons) {
  const item = ({ reason, count, remedy }) => {
    const steps = h("strong", {}, plural(count, "step"));
    return h("li", {}, steps, ` ${reason}`, remedy && note(plain(remedy)));
  };
  return h("ul", {}, ...reasons.map(item));
}

function countsOf({ totals }) {
  if (!totals) return null;
  return [
    ["parallel", totals.steps_parallel],
    ["fell back", totals.steps_fell_back],
    ["on one GPU, which is faster", totals.steps_chose_one_gpu],
    ["in ComfyUI alone, to compare", totals.steps_measured],
  ].filter(([, count]) => count);
}

const some = (list) => (list?.length ? list : null);

function stateOf({ schema, version, state, reason, remedy, num_ranks: numRanks }) {
  const isOther = schema !== undefined && schema !== SCHEMA;
  return {
    ...{ state, reason, version },
    notes: [
      plain(remedy),
      numRanks !== undefined && "XDIT_STATUS=all shows other machines the rest.",
      isOther && "This page is of another version than the server: reload it.",
    ].filter(Boolean),
  };
}

function stateLines({ state, reason, version, notes }) {
  return [
    h("p", { class: "xdit-now", "data-state": state }, h("strong", {}, state)),
    reason && h("pre", { tabindex: 0 }, reason),
    ...notes.map((text) => note(text)),
    version && note(`comfy-xdit-patch ${version}`),
  ].filter(Boolean);
}

/** A title, what of the status it shows (null: nothing now), and the elements for that. */
const SECTIONS = [
  ["State", stateOf, stateLines],
  ["Under way", ({ start, run }) => (start || run ? { start, run } : null), underWay],
  ["GPUs", ({ ranks }) => (some(ranks) ? { ranks, at: now() } : null), ranksList],
  ["Plan", ({ plan }) => plan, planPicture],
  ["Speed-up", measuredOf, measured],
  ["Fell back to one GPU", ({ fell_back: reasons }) => some(reasons), fallBacks],
  ["Steps since ComfyUI started", (status) => some(countsOf(status)), table],
  ["Last error", ({ last_error: error }) => error, ({ text }) => h("pre", { tabindex: 0 }, text)],
];

/** How busy each rank was, kept in the page for HISTORY_S seconds. */
export class History {
  #ranks = new Map();

  of(rank) {
    return this.#ranks.get(rank) ?? [];
  }

  add({ ranks = [] }) {
    const at = now();
    for (const { rank, busy_share: share } of ranks) {
      const kept = this.of(rank).filter((point) => at - point.at <= HISTORY_S);
      this.#ranks.set(rank, [...kept, { at, share }]);
    }
  }
}

/** The sections in an element of the page. `page` has `history` and `measureAgain`. */
export class View {
  #sections;
  #page;

  constructor(page, controls) {
    this.#page = page;
    this.#sections = SECTIONS.map(([title, of, elements]) => {
      const body = h("div", { role: title === "State" && "status" });
      const root = h("section", { "aria-label": title, hidden: true }, h("h3", {}, title), body);
      return { of, elements, root, body, json: "null" };
    });
    this.root = h(
      "div",
      { class: "xdit-panel" },
      ...this.#sections.map(({ root }) => root),
      h("section", { "aria-label": "Settings" }, h("h3", {}, "Settings"), controls),
    );
  }

  show(status) {
    for (const section of this.#sections) {
      const data = section.of(status) ?? null;
      const json = JSON.stringify(data);
      if (json === section.json) continue;
      section.json = json;
      section.root.hidden = data === null;
      const made = data === null ? [] : [section.elements(data, this.#page)].flat();
      section.body.replaceChildren(...made.filter((element) => element !== null));
    }
  }
}
