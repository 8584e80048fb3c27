// The settings that the panel changes (docs/settings.md), from the next prompt on.
//
// Runs in: ComfyUI's page. The server says what is legal. What is in no list here, such as a plan,
// is shown and kept where the environment or another program has set it.

import { api } from "../../scripts/api.js";
import { h } from "./elements.js";

const STRATEGIES = ["auto", "ulysses", "ring", "usp", "batch", "tensor", "fsdp", "pipefusion"];
const BALANCES = ["adaptive", "even", "weighted", "least_loaded"];
const SHOWN = [
  ["XDIT_STRATEGY", "Strategy", STRATEGIES],
  ["XDIT_GPUS", "GPUs", null],
  ["XDIT_BALANCE", "Balance", BALANCES],
];

/** Get, or with a body post, and return the answer; where the server says no, it has `error`. */
export async function ask(path, body) {
  const change = { method: "POST", headers: { "Content-Type": "application/json" } };
  const answer = await api.fetchApi(path, body ? { ...change, body: JSON.stringify(body) } : {});
  const text = await answer.text();
  return answer.headers.get("Content-Type")?.startsWith("application/json")
    ? JSON.parse(text)
    : { error: `${answer.status} ${text || answer.statusText}` };
}

/** A form. `root` is its element. */
export class Controls {
  #fields = new Map();
  #switch = h("input", { type: "checkbox", role: "switch", change: () => this.#turn() });
  #message = h("p", { class: "xdit-note", role: "status" });

  constructor() {
    const fields = SHOWN.map(([name, label, choices]) => {
      const options = choices?.map((value) => h("option", {}, value));
      const field = options ? h("select", {}, ...options) : h("input", { spellcheck: "false" });
      this.#fields.set(name, field);
      return h("label", {}, label, field);
    });
    this.root = h(
      "form",
      { submit: (event) => this.#submit(event) },
      h("label", {}, "Parallel", this.#switch),
      ...fields,
      h("button", { type: "submit" }, "Apply"),
      h("button", { type: "button", click: () => this.#change(null) }, "As at the start"),
      this.#message,
    );
    this.#show("/xdit/settings");
  }

  #submit(event) {
    event.preventDefault();
    this.#change((name) => this.#fields.get(name).value.trim() || null);
  }

  #change(valueOf) {
    const body = SHOWN.map(([name]) => [name, valueOf ? valueOf(name) : null]);
    return this.#show("/xdit/settings", Object.fromEntries(body));
  }

  #turn() {
    return this.#show("/xdit/settings", { XDIT_STRATEGY: this.#switch.checked ? null : "off" });
  }

  /** Ask, and show what holds then. Of a change that is refused the user's own words stay. */
  async #show(path, body) {
    const { variables = {}, is_pending: isPending, error } = await ask(path, body);
    const value = ({ value: now, pending }) => pending ?? now;
    const waits = isPending ? "From the end of this prompt on." : "";
    this.#message.textContent = error ?? (body && !isPending ? "From the next prompt on." : waits);
    this.#message.classList.toggle("xdit-error", Boolean(error));
    for (const [name, field] of this.#fields) {
      const known = variables[name];
      field.disabled = !known;
      if (!known) continue;
      field.title = known.legal;
      if (error) continue;
      field.value = value(known);
      if (field.value !== value(known)) {
        field.append(h("option", { selected: true }, value(known)));
      }
    }
    const strategy = variables.XDIT_STRATEGY;
    this.#switch.disabled = !strategy;
    this.#switch.checked = Boolean(strategy) && value(strategy) !== "off";
  }
}
