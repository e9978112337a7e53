/* ---------- token-to-token patterns: the numbers, and which of them are shown ---------- */

const pattern = {
  hovered: null, // {query, key} under the pointer or the arrow keys
  pinned: null,
  hideFirst: false,
  firstQuery: 0, // start of the windows, for prompts of more than MAX_TOKENS tokens
  firstKey: 0,
  layout: null, // "beside" or "one"; null: whichever fits the screen
  shown: new Set(), // ids of the panels that stand side by side
  single: null, // id of the panel that is shown alone, switched in place
  keys: true, // do the number keys switch panels?
  cell: MAX_CELL,
};
// Without a BOS token the first token is a sink all the same; but never hide the subject.
const canHideFirst = data.subject[0] > 0 && data.query > 0;

const unpacked = new Map(); // of the heads looked at last, by "name/state"

/**
 * The numbers of a packed matrix, as `_packed` in page.py wrote them: four characters are 24
 * bits, the upper 7 an exponent e and the lower 17 an integer m, which say m / 10^(4 + e).
 */
function unpack(text) {
  const digits = new Uint8Array(128);
  [...data.packing.alphabet].forEach((character, i) => (digits[character.charCodeAt(0)] = i));
  const values = new Float64Array(text.length / 4);
  for (let i = 0; i < values.length; i++) {
    let word = 0;
    for (let j = 4 * i; j < 4 * i + 4; j++) word = (word << 6) | digits[text.charCodeAt(j)];
    values[i] = word === 0xffffff ? NaN : (word & 0x1ffff) / 10 ** (4 + (word >> 17));
  }
  return values;
}

/** The attention of a stored head in a state, from token `query` to token `key`. */
function attentionAt(name, state, query, key) {
  const id = `${name}/${state.id}`;
  if (!unpacked.has(id)) {
    if (unpacked.size >= 4 * data.states.length) unpacked.clear();
    unpacked.set(id, unpack(patterns.get(name)[state.id]));
  }
  const values = unpacked.get(id);
  const size = data.tokens.length;
  const causal = values.length < size * size; // then only what is not masked is stored
  if (causal && key > query) return 0;
  const value = values[causal ? (query * (query + 1)) / 2 + key : query * size + key];
  return Number.isNaN(value) ? null : value;
}

/** Everything that a panel can show of head `name`: each state, and each change. */
const panels = data.states.flatMap((state) => {
  const plain = {
    id: `state-${state.id}`,
    label: inert(state.label),
    state,
    signed: false,
    format,
    value: (name, query, key) => attentionAt(name, state, query, key),
  };
  const change = {
    id: `change-${state.id}`,
    label: changeLabel(state),
    state,
    signed: true,
    format: formatChange,
    value: (name, query, key) =>
      minus(attentionAt(name, state, query, key), attentionAt(name, reference, query, key)),
  };
  return state === reference ? [plain] : [plain, change];
});
// The change of the first other state is the point; further changes can be switched on.
const panelsAtFirst = panels.filter((panel) => !panel.signed || panel.state === others[0]);

function resetPattern() {
  const size = data.tokens.length;
  const last = Math.max(0, size - MAX_TOKENS);
  pattern.hovered = null;
  pattern.pinned = null;
  pattern.hideFirst = false;
  pattern.firstQuery = clamp(data.query + 1 - MAX_TOKENS, 0, last);
  // Keys follow the queries if the subject is in that window, else they go to it.
  const together = data.subject[0] >= pattern.firstQuery;
  pattern.firstKey = together ? pattern.firstQuery : clamp(data.subject[0] - 8, 0, last);
  pattern.layout = null;
  pattern.shown = new Set(panelsAtFirst.map((panel) => panel.id));
  pattern.single = `state-${(others[0] ?? reference).id}`;
  pattern.keys = true;
}

const isHidden = (position) => pattern.hideFirst && position === 0;
const windowOf = (first) =>
  range(first, Math.min(first + MAX_TOKENS, data.tokens.length)).filter((i) => !isHidden(i));
const queries = () => windowOf(pattern.firstQuery);
const keys = () => windowOf(pattern.firstKey);

/** Over all stored heads and the whole prompt, so that no choice of view moves the scale. */
function storedExtent(signed) {
  const [all, withoutFirst] = data.packing[signed ? "change" : "attention"];
  const [low, high] = pattern.hideFirst ? withoutFirst : all;
  return { low, high };
}

resetPattern();
const patternScale = makeScale({
  id: "pattern",
  title: "Attention probability, all heads and states on one scale",
  colours: "probability",
  extent: () => storedExtent(false),
  changed: () => drawPanels(),
});
const patternChangeScale = makeScale({
  id: "pattern-change",
  title: "Change of attention probability",
  colours: "difference",
  signed: true,
  extent: () => storedExtent(true),
  changed: () => drawPanels(),
});
const scaleOf = (panel) => (panel.signed ? patternChangeScale : patternScale);

const selectedName = () => (ui.selected ? headName(ui.selected.layer, ui.selected.head) : null);
const currentCell = () => pattern.hovered ?? pattern.pinned ?? { query: data.query, key: subjectLast };

/** The panels on the screen: those switched on, or the one that is switched in place. */
const shownPanels = () =>
  panels.filter((panel) =>
    layoutNow() === "one" ? panel.id === pattern.single : pattern.shown.has(panel.id),
  );

/** How the panels stand: as the reader chose, else side by side where they fit at a glance. */
function layoutNow() {
  if (panels.length === 1) return "one";
  const room = byId("panels").clientWidth - labelWidth();
  const needed = panelsAtFirst.length * (keys().length * MIN_CELL + PANEL_GAP);
  return pattern.layout ?? (needed <= room ? "beside" : "one");
}

/** Room for the tokens at the left of the matrices, in px. */
function labelWidth() {
  const longest = Math.max(...queries().map((position) => tokenText(data.tokens[position]).length));
  return clamp(longest * 7 + 40, 60, byId("panels").clientWidth < 560 ? 92 : 124);
}

function tokenClass(position) {
  const [start, end] = data.subject;
  return (
    (position >= start && position < end ? " subject" : "") + (position === data.query ? " query" : "")
  );
}
