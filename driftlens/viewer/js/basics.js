/* ---------- the data, elements, texts and numbers ---------- */

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const [reference, ...others] = data.states;
const subjectLast = data.subject[1] - 1;
const layerCount = data.attention[reference.id].length;
const headCount = data.attention[reference.id][0].length;
const patterns = new Map(data.patterns); // packed; see patterns.js

const MAX_TOKENS = 64; // tokens along one side of a matrix; beyond, a window of them
const MIN_CELL = 11; // px of a matrix cell: below, neighbouring labels would overlap
const MAX_CELL = 24;
const PANEL_GAP = 16; // as in the style sheet
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
const MINUS = "\u2212";
const NOT_COMPUTED = "not computed";

/** A new element. `options`: class, text, and anything else as an attribute. */
function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A new element inside an SVG one, as its last child. */
function svgEl(svg, name, attributes, text) {
  // The element in the page knows its namespace, so that no address is written here.
  const node = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  svg.append(node);
  return node;
}

const range = (start, end) => Array.from({ length: Math.max(0, end - start) }, (_, i) => start + i);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const headName = (layer, head) => `L${layer}H${head}`;

function parseHead(name) {
  const match = /^L(\d+)H(\d+)$/.exec(name);
  if (!match) return null;
  const [layer, head] = [Number(match[1]), Number(match[2])];
  return layer < layerCount && head < headCount ? { layer, head } : null;
}

function subtract(after, before) {
  return after.map((row, i) => row.map((value, j) => minus(value, before[i][j])));
}

const minus = (a, b) => (a === null || b === null ? null : a - b);

// Controls, format and bidi marks, unassigned code points and every space but the
// plain one: a reader cannot see them, and bidi marks would reorder what is around.
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}]|[^\S ]/gu;

function writeOut(character) {
  const code = character.codePointAt(0);
  if (character === "\n") return "\u21b5";
  if (character === "\t") return "\u21e5";
  return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
}

/** A text with its invisible characters written out. */
const inert = (text) => text.replace(HIDDEN, writeOut);

/** A token: as above, and the spaces at its ends can be seen too. */
function tokenText(token) {
  if (token === "") return "\u27e8empty\u27e9";
  const shown = inert(token).replace(/^ +| +$/g, (spaces) => "\u00b7".repeat(spaces.length));
  return /^\p{M}/u.test(shown) ? `\u25cc${shown}` : shown; // an accent needs a bearer
}

const quoted = (position) => `\u201c${tokenText(data.tokens[position])}\u201d`;

/** A number with up to `digits` significant digits. */
function format(value, digits = 5) {
  if (value === null || value === undefined) return NOT_COMPUTED;
  if (value === 0) return "0";
  const text =
    Math.abs(value) < 1e-4
      ? value.toExponential(2).replace("e-", "e\u2212")
      : String(Number(value.toPrecision(digits)));
  return text.replace(/^-/, MINUS);
}

// But for rounding, which may go either way.
const nothingWasLost =
  data.restored && data.restored.original[0] <= data.restored.edited[0] * (1 + 1e-4);

/** A recovered share: of nothing there is none. */
const formatShare = (share) =>
  share === null && nothingWasLost ? "undefined, as nothing was lost" : format(share);

/** A difference of two rounded numbers: five decimals are what both support. */
function formatChange(value) {
  if (value === null) return NOT_COMPUTED;
  const text = Math.abs(value).toFixed(5);
  if (Number(text) === 0) return "0.00000";
  return (value > 0 ? "+" : MINUS) + text;
}

/** A formatter for one column: as many decimals in every row as some row needs, at most four. */
function formatColumn(values) {
  const decimals = Math.max(
    0,
    ...values.map((value) => {
      const text = String(value);
      return /^-?\d+\.\d+$/.test(text) ? Math.min(4, text.split(".")[1].length) : 0;
    }),
  );
  return (value) => {
    if (value === null) return "n/a";
    const text = value.toFixed(decimals);
    // Never round a small number away to nothing.
    return value !== 0 && Number(text) === 0 ? format(value, 2) : text.replace(/^-/, MINUS);
  };
}

const changeLabel = (state) => `${inert(state.label)} ${MINUS} ${inert(reference.label)}`;
