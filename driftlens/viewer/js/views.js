/* ---------- what can be looked at ---------- */

const changes = new Map(); // per state, attention minus that of the reference

// Per layer, the most that any head paid to the subject before.
const mostBefore = data.attention[reference.id].map((row) => {
  const known = row.filter((value) => value !== null);
  return known.length ? Math.max(...known) : Infinity;
});

/** SADR's rule: more attention to the subject than any head of the layer paid before. */
function overAttends(state, layer, head) {
  const value = data.attention[state.id][layer][head];
  return state !== reference && value !== null && value > mostBefore[layer];
}

const attentionScale = makeScale({
  id: "attention",
  title: "Attention probability, all states on one scale",
  colours: "probability",
  extent: () => extentOf(Object.values(data.attention)),
  changed: () => drawOverview(),
});
const changeScale = makeScale({
  id: "change",
  title: "Change of attention probability",
  colours: "difference",
  signed: true,
  extent: () => extentOf(others.map(changeOf)),
  changed: () => drawOverview(),
});
const divergenceScale = makeScale({
  id: "divergence",
  title: `KL(${inert(reference.label)} \u2016 state) of the row, nats`,
  colours: "divergence",
  extent: () => extentOf(Object.values(data.kl)),
  changed: () => drawOverview(),
});

function changeOf(state) {
  if (!changes.has(state.id)) {
    changes.set(state.id, subtract(data.attention[state.id], data.attention[reference.id]));
  }
  return changes.get(state.id);
}

/** Every map that the overview can show. */
const views = [
  ...data.states.map((state) => ({
    id: `attention-${state.id}`,
    group: "Attention",
    label: inert(state.label),
    state,
    scale: attentionScale,
    grid: data.attention[state.id],
    format,
  })),
  ...others.map((state) => ({
    id: `change-${state.id}`,
    group: "Change",
    label: changeLabel(state),
    state,
    scale: changeScale,
    grid: changeOf(state),
    format: formatChange,
  })),
  ...others
    .filter((state) => data.kl[state.id])
    .map((state) => ({
      id: `kl-${state.id}`,
      group: `KL from ${inert(reference.label)}`,
      label: inert(state.label),
      state,
      scale: divergenceScale,
      grid: data.kl[state.id],
      format,
    })),
];

/* ---------- what the reader is looking at ---------- */

const firstStored = data.patterns.length ? parseHead(data.patterns[0][0]) : null;
const startingView = views.find((view) => view.group === "Change") ?? views[0];
const ui = {
  view: startingView,
  selected: firstStored, // {layer, head} or null
  hovered: null, // {layer, head} under the pointer or focus, or null
  marked: true, // mark heads that over-attend
};

const sameHead = (a, b) => (a && b ? a.layer === b.layer && a.head === b.head : a === b);

function selectHead(layer, head) {
  const chosen = { layer, head };
  ui.selected = sameHead(ui.selected, chosen) ? null : chosen;
  drawSelection();
}

function hoverHead(place) {
  ui.hovered = place;
  for (const map of maps) map.link(place);
  drawHeadReadout();
}
