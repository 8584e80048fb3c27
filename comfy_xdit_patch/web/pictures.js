// The two pictures of the panel: how busy a rank was, and who stands where in a plan.
//
// Runs in: ComfyUI's page.

import { svg } from "./elements.js";

export const HISTORY_S = 120;

/** From the outermost axis to the innermost, as ranks are numbered (planning/grid.py). */
const AXES = ["batch", "pipefusion", "ring", "ulysses", "tensor"];
const ROWS = new Set(["batch", "pipefusion", "ring"]); // parts of these stand one below another
const WIDTH = 280;
const CELL = 26;
const LABEL = 13;
const GAP = 4;

/**
 * A line of shares from 0 to 1 over the last HISTORY_S seconds.
 *
 * @param {{at: number, share: number}[]} history oldest first; `at` in seconds
 * @param {number} now in seconds
 */
export function sparkline(history, now) {
  const x = (at) => (100 * (1 - (now - at) / HISTORY_S)).toFixed(1);
  const line = history.map(({ at, share }) => `${x(at)},${(20 - 19 * share).toFixed(1)}`).join(" ");
  const fill = history.length > 1 && `${x(history[0].at)},20 ${line} ${x(history.at(-1).at)},20`;
  const mean = history.reduce((sum, { share }) => sum + share, 0) / (history.length || 1);
  return svg(
    "svg",
    {
      class: "xdit-spark",
      viewBox: "0 0 100 20",
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": `${Math.round(100 * mean)} % busy in the last two minutes`,
    },
    fill && svg("polygon", { points: fill }),
    fill && svg("polyline", { points: line }),
  );
}

/**
 * The grid of ranks of a plan: a cell for each rank, a box around those that share an axis.
 *
 * @param {Object<string, number>} degrees ranks along each axis; those of 1 may be left out
 */
export function grid(degrees) {
  const axes = AXES.filter((axis) => degrees[axis] > 1);
  const height = heightOf(axes, degrees);
  const told = axes.map((axis) => `${axis} ${degrees[axis]}`).join(" x ") || "one";
  const picture = svg("svg", {
    class: "xdit-grid",
    viewBox: `0 0 ${WIDTH} ${height}`,
    role: "img",
    "aria-label": `${product(axes, degrees)} ranks: ${told}`,
  });
  draw(picture, axes, degrees, { rank: 0, x: 0, y: 0, width: WIDTH, place: [] });
  return picture;
}

function product(axes, degrees) {
  return axes.reduce((ranks, axis) => ranks * degrees[axis], 1);
}

function heightOf([axis, ...inner], degrees) {
  if (!axis) return CELL;
  const part = heightOf(inner, degrees);
  return LABEL + GAP + (ROWS.has(axis) ? degrees[axis] * (part + GAP) - GAP : part);
}

function draw(picture, axes, degrees, { rank, x, y, width, place }) {
  const [axis, ...inner] = axes;
  const height = heightOf(axes, degrees);
  if (!axis) {
    const title = svg("title", {}, place.join(", "));
    picture.append(
      svg("rect", { class: "xdit-cell", x, y, width, height, rx: 3 }, title),
      svg("text", { class: "xdit-number", x: x + width / 2, y: y + height / 2 }, String(rank)),
    );
    return;
  }
  const num = degrees[axis];
  picture.append(
    svg("rect", { class: "xdit-box", x, y, width, height, rx: 4 }),
    svg("text", { class: "xdit-axis", x: x + GAP, y: y + LABEL - GAP }, `${axis} ${num}`),
  );
  const inside = width - 2 * GAP;
  const [across, down] = ROWS.has(axis)
    ? [0, heightOf(inner, degrees) + GAP]
    : [(inside + GAP) / num, 0];
  for (let part = 0; part < num; part += 1) {
    draw(picture, inner, degrees, {
      rank: rank + part * product(inner, degrees),
      x: x + GAP + part * across,
      y: y + LABEL + part * down,
      width: across ? across - GAP : inside,
      place: [...place, `${axis} ${part}`],
    });
  }
}
