// The sidebar tab of comfy-xdit-patch: looks at /xdit/status, shows it, and says what changed.
//
// Runs in: ComfyUI's page, whose front end imports every module of this folder. There is no build
// step, and nothing comes from another host.
//
// It looks once a second while the tab is open. Otherwise only while something is under way, every
// five seconds, and when ComfyUI's own messages say that its queue has changed: a page that has
// nothing to do, or that is hidden, asks nothing.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ask, Controls } from "./controls.js";
import { plain } from "./elements.js";
import { History, View } from "./view.js";

const OPEN_MS = 1000;
const UNDER_WAY_MS = 5000;
const TOAST_MS = 8000;
const TAB = "comfy-xdit";
const ICON = "pi pi-microchip";
const SIGNS = { starting: "...", broken: "!", refused: "!" };

const history = new History();
let status = null;
let view = null;
let looking = null;
let timer = null;
let numQueued = 0;
let notice = ""; // on the tab's icon, until the tab is opened
let told = new Set(); // why steps fell back: once until the queue is empty

/** Look now, once at a time. */
function look() {
  looking ??= lookOnce().finally(() => { looking = null; });
  return looking;
}

function lookIfSeen() {
  if (!document.hidden) look();
}

async function lookOnce() {
  clearTimeout(timer);
  const before = status;
  try {
    status = await ask("/xdit/status");
    if (status.error) throw new Error(status.error);
  } catch (error) {
    status = { state: "unknown", reason: `ComfyUI does not answer: ${error.message}` };
  }
  history.add(status);
  view?.show(status);
  tell(before);
  wait();
}

function wait() {
  clearTimeout(timer);
  const isUnderWay = numQueued > 0 || ["starting", "computing"].includes(status?.state);
  const ms = view ? OPEN_MS : isUnderWay ? UNDER_WAY_MS : null;
  if (ms && !document.hidden) timer = setTimeout(look, ms);
}

/** Say in a toast, and on the tab's icon, what has changed since the status before. */
function tell(before) {
  const num = status.ranks?.length ?? status.num_ranks;
  const isUp = status.state === "ready" || status.state === "computing";
  if (!before) return;
  if (before.state !== status.state) {
    if (status.state === "starting") toast("info", `starting ${num} ranks`);
    if (status.state === "broken") toast("error", "the ranks are lost", status.reason);
  }
  const isKnown = before.ranks !== undefined; // there was an answer, and not another machine's
  for (const { reason, count, remedy } of isKnown ? (status.fell_back ?? []) : []) {
    const earlier = before.fell_back.find((fell) => fell.reason === reason)?.count ?? 0;
    if (count > earlier && !told.has(reason)) {
      told.add(reason);
      notice = "!";
      toast("warn", `steps run on one GPU: ${reason}`, plain(remedy));
    }
  }
  if (isKnown && isUp && processes(before) !== processes(status)) {
    notice = "\u2713";
    toast("success", `${num} ranks are ready`);
  }
  if (!numQueued) told = new Set();
  if (view) notice = "";
  const tab = app.extensionManager.getSidebarTabs().find(({ id }) => id === TAB);
  if (tab) tab.iconBadge = signOf(status);
}

function signOf({ state }) {
  return SIGNS[state] ?? notice;
}

function processes({ ranks }) {
  return JSON.stringify(ranks?.map(({ pid }) => pid));
}

function toast(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary: `xDiT: ${summary}`, detail, life: TOAST_MS });
}

async function measureAgain() {
  const { error } = await ask("/xdit/measure", {});
  toast(error ? "error" : "info", error ?? "auto measures again from the next step on");
}

function render(element) {
  if (view && element.contains(view.root)) return; // called at each of the front end's renders
  view = new View({ history, measureAgain }, new Controls().root);
  element.replaceChildren(view.root);
  if (status) view.show(status);
  look();
}

function destroy() {
  view = null;
}

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("panel.css", import.meta.url).href;
document.head.append(style);

api.addEventListener("status", ({ detail }) => {
  numQueued = detail?.exec_info?.queue_remaining ?? 0;
  lookIfSeen();
});
document.addEventListener("visibilitychange", lookIfSeen);

await look();
app.registerExtension({
  name: "comfy-xdit-patch",
  aboutPageBadges: [
    { label: `comfy-xdit-patch ${status.version}`, url: api.apiURL("/xdit/status"), icon: ICON },
  ],
  setup() {
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: ICON,
      iconBadge: signOf(status),
      title: "xDiT",
      tooltip: "GPUs that make one image together",
      type: "custom",
      render,
      destroy,
    });
  },
});
