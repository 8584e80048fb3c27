// Make elements of the page.
//
// Runs in: ComfyUI's page. What a server says becomes text nodes and attributes here, never HTML.

const SVG = "http://www.w3.org/2000/svg";

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

/** A remedy without its code marks, null without one. */
export function plain(remedy) {
  return remedy?.replaceAll("`", "") ?? null;
}

/** An element of HTML. Functions among the attributes listen; null and false are left out. */
export function h(tag, attributes = {}, ...children) {
  return made(document.createElement(tag), attributes, children);
}

/** An element of SVG, made in the same way. */
export function svg(tag, attributes = {}, ...children) {
  return made(document.createElementNS(SVG, tag), attributes, children);
}
