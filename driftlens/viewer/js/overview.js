/* ---------- overview ---------- */

function describeHead(layer, head) {
  const parts = [
    `Layer ${layer}, head ${head}: ${ui.view.label} ${ui.view.format(ui.view.grid[layer][head])}`,
    ...data.states.map(
      (state) => `${inert(state.label)} ${format(data.attention[state.id][layer][head])}`,
    ),
  ];
  if (overAttends(ui.view.state, layer, head)) parts.push("over-attends");
  if (patterns.has(headName(layer, head))) parts.push("pattern stored");
  return parts.join(", ");
}

const overviewMap = makeMap(byId("overview-map"), {
  label: () => `${ui.view.group}: ${ui.view.label}. Layers by heads.`,
  scale: () => ui.view.scale,
  value: (layer, head) => ui.view.grid[layer][head],
  describe: describeHead,
  over: (layer, head) => ui.marked && overAttends(ui.view.state, layer, head),
});

function makeViewChoice() {
  const groups = [...new Set(views.map((view) => view.group))];
  const fieldsets = groups.map((group) =>
    el(
      "fieldset",
      {},
      el("legend", { text: group }),
      el(
        "div",
        { class: "segments" },
        views
          .filter((view) => view.group === group)
          .map((view) => {
            const input = el("input", { type: "radio", name: "view", value: view.id });
            input.addEventListener("change", () => {
              ui.view = view;
              drawOverview();
            });
            return el("label", {}, input, view.label);
          }),
      ),
    ),
  );
  const mark = el("input", { type: "checkbox", id: "mark-over" });
  mark.addEventListener("change", () => {
    ui.marked = mark.checked;
    drawOverview();
  });
  const markLabel = others.length
    ? el("label", { class: "check" }, mark, "Mark heads that over-attend")
    : null;
  byId("views").replaceChildren(...fieldsets, ...(markLabel ? [markLabel] : []));
}

function drawOverview() {
  for (const input of byId("views").querySelectorAll("input[type=radio]")) {
    input.checked = input.value === ui.view.id;
  }
  if (byId("mark-over")) byId("mark-over").checked = ui.marked;
  if (byId("overview-scale").firstChild !== ui.view.scale.node) {
    byId("overview-scale").replaceChildren(ui.view.scale.node);
  }
  ui.view.scale.draw();
  byId("view-name").textContent = overviewMap.label();
  overviewMap.paint();
  drawLargest();
  drawHeadReadout();
}

/** The heads with the largest values of this view: a way in without hunting. */
function drawLargest() {
  const heads = ui.view.grid
    .flatMap((row, layer) => row.map((value, head) => ({ layer, head, value })))
    .filter(({ value }) => value !== null)
    .sort((a, b) => Math.abs(b.value) - Math.abs(a.value))
    .slice(0, 16);
  byId("largest").replaceChildren(
    ...heads.map(({ layer, head, value }) =>
      el("li", {}, headButton(layer, head), el("span", { text: ui.view.format(value) })),
    ),
  );
}

function headButton(layer, head) {
  const button = el("button", { type: "button", class: "link", text: headName(layer, head) });
  button.addEventListener("click", () => {
    ui.selected = { layer, head };
    drawSelection();
  });
  const at = { layer, head };
  button.addEventListener("pointerenter", () => hoverHead(at));
  button.addEventListener("pointerleave", () => hoverHead(null));
  button.addEventListener("focus", () => hoverHead(at));
  button.addEventListener("blur", () => hoverHead(null));
  return button;
}

/** All values of the head under the pointer, else of the selected one. */
function drawHeadReadout() {
  const box = byId("head-readout");
  const at = ui.hovered ?? ui.selected;
  if (!at) {
    box.replaceChildren(
      el("p", { class: "note", text: "Point at a cell, or move the focus to it, for its exact values." }),
    );
    return;
  }
  box.replaceChildren(...readoutParts(at));
}

/** What is said about a head besides its numbers. */
function headTags(layer, head) {
  return [
    ...others
      .filter((state) => overAttends(state, layer, head))
      .map((state) => `over-attends: ${inert(state.label)}`),
    patterns.has(headName(layer, head)) ? "pattern stored" : "values only, no pattern stored",
  ];
}

/**
 * Keep room for the tallest readout: on a narrow screen it stands above the map, which must not
 * move away under the pointer when another head is pointed at.
 */
function reserveReadout() {
  const length = ({ layer, head }) => headTags(layer, head).join("  ").length;
  const heads = range(0, layerCount).flatMap((layer) =>
    range(0, headCount).map((head) => ({ layer, head })),
  );
  const lengths = heads.map(length);
  const tallest = heads[lengths.reduce((best, own, i) => (own > lengths[best] ? i : best), 0)];
  const box = byId("head-readout");
  box.style.minHeight = "";
  box.replaceChildren(...readoutParts(tallest), matricesButton());
  box.style.minHeight = `${box.offsetHeight}px`;
  drawHeadReadout();
}

function matricesButton() {
  const go = el("button", { type: "button", text: "See its matrices below" });
  go.addEventListener("click", () =>
    byId("head").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" }),
  );
  return go;
}

/** A head's name, its tags, and its numbers in every state. */
function readoutParts(at) {
  const { layer, head } = at;
  const name = headName(layer, head);
  const tags = headTags(layer, head);
  const kl = others.some((state) => data.kl[state.id]);
  const rows = data.states.map((state) => [
    inert(state.label),
    format(data.attention[state.id][layer][head]),
    state === reference ? "" : formatChange(changeOf(state)[layer][head]),
    ...(kl ? [data.kl[state.id] ? format(data.kl[state.id][layer][head]) : ""] : []),
  ]);
  const children = [
    el("span", { class: "name", text: name }),
    ...tags.map((text) => el("span", { class: "tag", text })),
    simpleTable(["", "Attention", "Change", ...(kl ? ["KL, nats"] : [])], rows, "small"),
  ];
  if (data.sweep) {
    const share = data.sweep.heads[layer][head];
    children.push(
      el("p", { class: "recovers", text: `Restoring this head alone recovers: ${formatShare(share)}` }),
    );
  }
  if (sameHead(at, ui.selected) && patterns.has(name)) children.push(matricesButton());
  return children;
}

function simpleTable(columns, rows, className) {
  return el(
    "table",
    { class: className },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        columns.map((text, i) =>
          text ? el("th", { scope: "col", class: i ? "number" : null, text }) : el("td"),
        ),
      ),
    ),
    el(
      "tbody",
      {},
      rows.map((cells) =>
        el(
          "tr",
          {},
          cells.map((text, i) =>
            i ? el("td", { class: "number", text }) : el("th", { scope: "row" }, text),
          ),
        ),
      ),
    ),
  );
}
