/* ---------- the matrices of one head ---------- */

/** After another head was selected, or none. */
function drawSelection() {
  const name = selectedName();
  overviewMap.paint();
  sweepMap?.paint();
  drawHeadReadout();
  byId("head-heading").textContent = name ? `Head ${name}, token by token` : "One head, token by token";
  byId("head-note").textContent = headNote(name);
  byId("head-body").hidden = !patterns.has(name);
  drawStored(name);
  if (patterns.has(name)) buildPanels();
  tellOpened();
}

function headNote(name) {
  if (!patterns.size) return "No token-to-token patterns are stored in this page.";
  if (!name)
    return "Choose a head above. Token-to-token patterns are stored for the heads listed here, marked by a dot in the map.";
  if (patterns.has(name))
    return "Rows attend to columns. The dots above mark all heads with a stored pattern; others show their values only.";
  return `No token-to-token pattern is stored for ${name}; its values stand next to the map. Patterns are stored for the heads listed here.`;
}

function drawStored(name) {
  byId("stored").replaceChildren(
    el("span", { class: "label", text: patterns.size ? "Stored" : "" }),
    ...[...patterns.keys()].map((stored) => {
      const button = el("button", {
        type: "button",
        text: stored,
        "aria-pressed": String(stored === name),
      });
      button.addEventListener("click", () => {
        const { layer, head } = parseHead(stored);
        selectHead(layer, head);
        // The list was redrawn: give the keyboard its place back.
        [...byId("stored").querySelectorAll("button")].find((b) => b.textContent === stored)?.focus();
      });
      return button;
    }),
  );
}

/** How the panels stand, which of them, and what else can be switched; see drawPanelChoice. */
function makePanelChoice() {
  const layouts = [
    ["beside", "Side by side"],
    ["one", "One, switched in place"],
  ].map(([id, text]) => {
    const input = el("input", { type: "radio", name: "layout", value: id });
    input.addEventListener("change", () => {
      pattern.layout = id;
      buildPanels();
    });
    return el("label", {}, input, text);
  });
  const hide = el("input", { type: "checkbox", id: "hide-first" });
  hide.addEventListener("change", () => {
    pattern.hideFirst = hide.checked;
    patternScale.refresh();
    patternChangeScale.refresh();
    buildPanels();
  });
  const hideText = data.bos ? "Hide the BOS token" : "Hide the first token";
  const numberKeys = el("input", { type: "checkbox", id: "number-keys" });
  numberKeys.addEventListener("change", () => (pattern.keys = numberKeys.checked));
  const several = panels.length > 1;
  byId("panel-choice").replaceChildren(
    ...(several
      ? [
          el(
            "fieldset",
            {},
            el("legend", { text: "Layout" }),
            el("div", { class: "segments", id: "layouts" }, layouts),
          ),
          el(
            "fieldset",
            {},
            el("legend", { id: "panel-legend" }),
            el("div", { class: "segments", id: "panel-buttons" }),
          ),
        ]
      : []),
    ...(canHideFirst ? [el("label", { class: "check" }, hide, hideText)] : []),
    ...(several
      ? [el("label", { class: "check" }, numberKeys, `Keys 1\u2013${Math.min(9, panels.length)} switch matrices`)]
      : []),
  );
}

/** The buttons of the panels: one of them, or any of them, as the layout is. */
function drawPanelChoice() {
  if (byId("hide-first")) byId("hide-first").checked = pattern.hideFirst;
  if (panels.length === 1) return;
  byId("number-keys").checked = pattern.keys;
  const layout = layoutNow();
  for (const input of byId("layouts").querySelectorAll("input")) input.checked = input.value === layout;
  const box = byId("panel-buttons");
  if (box.dataset.layout !== layout) {
    box.dataset.layout = layout;
    byId("panel-legend").textContent = layout === "one" ? "Matrix shown" : "Matrices shown";
    box.replaceChildren(
      ...panels.map((panel, i) => {
        const type = layout === "one" ? "radio" : "checkbox";
        const input = el("input", { type, name: "panel", value: panel.id });
        input.addEventListener("change", () => switchPanel(panel));
        return el("label", {}, input, i < 9 ? el("kbd", { "aria-hidden": "true", text: i + 1 }) : "", panel.label);
      }),
    );
  }
  for (const input of box.querySelectorAll("input")) {
    input.checked = layout === "one" ? input.value === pattern.single : pattern.shown.has(input.value);
  }
}

/** Show a panel in the place of the other one; side by side, switch it on or off. */
function switchPanel(panel) {
  if (layoutNow() === "one") {
    pattern.single = panel.id;
    const box = byId("panels").querySelector(".panel:not(.query-labels)");
    namePanel(box, panel); // the same node stays where it is, so that only what differs moves
    drawPanelChoice();
    drawPanels();
    return;
  }
  if (!pattern.shown.has(panel.id)) pattern.shown.add(panel.id);
  else if (pattern.shown.size > 1) pattern.shown.delete(panel.id);
  buildPanels();
}

function namePanel(box, panel) {
  box.querySelector("h3").textContent = panel.label;
  box.querySelector(".sheet").dataset.panel = panel.id;
  box
    .querySelector("canvas")
    .setAttribute("aria-label", `${panel.label}: matrix; its values are in the table below`);
}

/** Sliders over a long prompt, and the notice that it is cut. */
function makeWindowChoice() {
  const size = data.tokens.length;
  if (size <= MAX_TOKENS) return;
  const slider = (text, field) => {
    const input = el("input", {
      type: "range",
      min: 0,
      max: size - MAX_TOKENS,
      step: 1,
      "data-window": field,
    });
    input.addEventListener("input", () => {
      pattern[field] = Number(input.value);
      pattern.pinned = null;
      buildPanels();
    });
    return el("label", {}, text, input, el("span", { "data-shows": field }));
  };
  byId("window").append(
    el("span", { text: `The prompt has ${size} tokens; ${MAX_TOKENS} are shown along each side.` }),
    slider("Rows", "firstQuery"),
    slider("Columns", "firstKey"),
  );
  byId("window").hidden = false;
}

function drawWindowChoice() {
  for (const field of ["firstQuery", "firstKey"]) {
    const input = byId("window").querySelector(`[data-window=${field}]`);
    if (!input) return;
    input.value = String(pattern[field]);
    byId("window").querySelector(`[data-shows=${field}]`).textContent =
      `${pattern[field]}\u2013${pattern[field] + MAX_TOKENS - 1}`;
  }
}

/** Lay out the panels anew: their number, size or tokens have changed. */
function buildPanels() {
  if (!patterns.has(selectedName())) return;
  const box = byId("panels");
  const shown = shownPanels();
  const one = layoutNow() === "one";
  drawPanelChoice();
  // Switched in place, nothing around the matrix may come and go: both legends stay.
  byId("pattern-scales").replaceChildren(
    ...[
      one || shown.some((panel) => !panel.signed) ? patternScale.node : null,
      (one && panels.length > 1) || shown.some((panel) => panel.signed) ? patternChangeScale.node : null,
    ].filter(Boolean),
  );

  // On a narrow screen one panel fills the box; the edge of the next invites a swipe.
  const narrow = box.clientWidth < 700;
  const side = narrow || one ? 1 : shown.length;
  const room =
    (box.clientWidth - labelWidth() - PANEL_GAP * side - (narrow && !one ? 32 : 8)) /
    (side * keys().length);
  pattern.cell = clamp(Math.floor(room), MIN_CELL, MAX_CELL);

  box.replaceChildren(queryLabels(labelWidth()), ...shown.map(makePanel));
  box.setAttribute(
    "aria-label",
    `Attention matrices of head ${selectedName()}: arrow keys move, Enter pins`,
  );
  drawWindowChoice();
  makeStrips(panels.filter((panel) => !panel.signed && (one || pattern.shown.has(panel.id))));
  drawPanels();
}

function queryLabels(width) {
  const column = el("div", { class: "panel query-labels" }, el("h3", { text: "from \u2193" }));
  column.style.width = `${width}px`;
  for (const position of queries()) {
    const label = tokenLabel(position, "query");
    label.style.height = `${pattern.cell}px`;
    column.append(label);
  }
  return column;
}

function tokenLabel(position, axis) {
  const label = el(
    "div",
    {
      class: `lab${tokenClass(position)}`,
      title: `${tokenText(data.tokens[position])} (${position})`,
      "data-axis": axis,
      "data-position": position,
    },
    el("bdi", {
      text:
        (position === data.query && axis === "query" ? "\u25b8" : "") + tokenText(data.tokens[position]),
    }),
    el("span", { class: "at", text: String(position) }),
  );
  const row = axis === "query" ? position : data.query;
  const column = axis === "key" ? position : subjectLast;
  label.addEventListener("pointerenter", () => hoverCell({ query: row, key: column }));
  label.addEventListener("pointerleave", () => hoverCell(null));
  label.addEventListener("click", () => pinCell({ query: row, key: column }));
  return label;
}

function makePanel(panel) {
  const { cell } = pattern;
  const canvas = el("canvas", { role: "img" });
  const sheet = el(
    "div",
    { class: "sheet", "data-panel": panel.id },
    canvas,
    el("div", { class: "cross across" }),
    el("div", { class: "cross down" }),
    el("div", { class: "cross spot" }),
  );
  sheet.style.width = `${cell * keys().length}px`;
  sheet.style.height = `${cell * queries().length}px`;
  const place = (event) => {
    const box = sheet.getBoundingClientRect();
    const query = queries()[Math.floor((event.clientY - box.top) / cell)];
    const key = keys()[Math.floor((event.clientX - box.left) / cell)];
    return query === undefined || key === undefined ? null : { query, key };
  };
  sheet.addEventListener("pointermove", (event) => hoverCell(place(event)));
  sheet.addEventListener("pointerleave", () => hoverCell(null));
  sheet.addEventListener("click", (event) => pinCell(place(event)));
  const labels = el(
    "div",
    { class: "key-labels" },
    keys().map((position) => {
      const label = tokenLabel(position, "key");
      label.style.width = `${cell}px`;
      return label;
    }),
  );
  const box = el(
    "div",
    { class: "panel" },
    el("h3"),
    sheet,
    labels,
    el("div", { class: "key-title", text: "to \u2192" }),
  );
  namePanel(box, panel);
  return box;
}

/** Redraw colours and marks of the panels that are there. */
function drawPanels() {
  patternScale.draw();
  patternChangeScale.draw();
  const name = selectedName();
  if (!patterns.has(name)) return;
  for (const sheet of byId("panels").querySelectorAll(".sheet")) {
    const panel = panels.find((candidate) => candidate.id === sheet.dataset.panel);
    const canvas = sheet.querySelector("canvas");
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(pattern.cell * keys().length * ratio);
    canvas.height = Math.round(pattern.cell * queries().length * ratio);
    canvas.style.width = sheet.style.width;
    canvas.style.height = sheet.style.height;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    paint(context, matrixItems(panel, name, 0, 0));
  }
  drawCross();
}

/** The cells of a matrix as they are drawn, on the screen and in pictures. */
function matrixItems(panel, name, left, top) {
  const { cell } = pattern;
  return queries().flatMap((query, y) =>
    keys().flatMap((key, x) => {
      const value = panel.value(name, query, key);
      if (key > query && !value) return []; // causal mask: nothing to attend to, so no colour
      return cellItems(scaleOf(panel), value, left + x * cell, top + y * cell, cell - 1, cell - 1);
    }),
  );
}

function hoverCell(place) {
  if (sameCell(place, pattern.hovered)) return;
  pattern.hovered = place;
  drawCross();
}

function pinCell(place) {
  pattern.pinned = sameCell(place, pattern.pinned) ? null : place;
  drawCross();
}

const sameCell = (a, b) => (a && b ? a.query === b.query && a.key === b.key : a === b);

/** Light up the row and the column of the current cell, in matrices, text and table. */
function drawCross() {
  const { query, key } = currentCell();
  const { cell } = pattern;
  const [x, y] = [keys().indexOf(key), queries().indexOf(query)];
  const put = (node, visible, left, top, width, height) => {
    node.hidden = !visible;
    Object.assign(node.style, {
      left: `${left}px`,
      top: `${top}px`,
      width: `${width}px`,
      height: `${height}px`,
    });
  };
  for (const sheet of byId("panels").querySelectorAll(".sheet")) {
    const [across, down, spot] = sheet.querySelectorAll(".cross");
    put(across, y >= 0, 0, y * cell, keys().length * cell - 1, cell - 1);
    put(down, x >= 0, x * cell, 0, cell - 1, queries().length * cell - 1);
    put(spot, x >= 0 && y >= 0, x * cell, y * cell, cell - 1, cell - 1);
  }
  for (const label of byId("panels").querySelectorAll(".lab")) {
    const position = Number(label.dataset.position);
    label.classList.toggle("on", position === (label.dataset.axis === "query" ? query : key));
  }
  drawCellReadout(query, key);
  paintStrips(query, key);
  drawRowTable(query);
}

/** Scroll to the cell under the cross, in the matrix of which most is in view. */
function showCross() {
  const box = byId("panels");
  const { left, right } = box.getBoundingClientRect();
  const seen = (sheet) => {
    const own = sheet.getBoundingClientRect();
    return Math.min(own.right, right) - Math.max(own.left, left);
  };
  const sheets = [...box.querySelectorAll(".sheet")].sort((a, b) => seen(b) - seen(a));
  const labels = box.querySelector(".query-labels").offsetWidth; // they stay where they are
  box.style.scrollPaddingLeft = `${labels + 6}px`;
  sheets[0].querySelector(".cross.spot").scrollIntoView({ block: "nearest", inline: "nearest" });
}

function drawCellReadout(query, key) {
  const name = selectedName();
  const shown = new Set(shownPanels());
  const values = panels.map((panel) =>
    el(
      "span",
      { class: shown.has(panel) && layoutNow() === "one" ? "pair shown" : "pair" },
      `${panel.label} `,
      el("b", { text: panel.format(panel.value(name, query, key)) }),
    ),
  );
  const where = el(
    "span",
    { class: "where" },
    "From ",
    el("b", {}, el("bdi", { text: quoted(query) })),
    ` (${query}) to `,
    el("b", {}, el("bdi", { text: quoted(key) })),
    ` (${key})`,
    pattern.pinned && !pattern.hovered ? ", pinned" : "",
  );
  // Columns of one width: no number may be so long that the matrices below move.
  const longest = Math.max(...panels.map((panel) => panel.label.length));
  const box = el("span", { class: "values" }, values);
  box.style.setProperty("--column", `${longest + 13}ch`);
  byId("cell-readout").replaceChildren(where, box);
}

/** The prompt once per state, shaded by the attention from the current row. */
function makeStrips(shown) {
  const box = byId("strips");
  box.replaceChildren(
    ...shown.flatMap((panel) => [
      el("span", { class: "state", text: panel.label }),
      el(
        "p",
        { class: "tokens", "data-strip": panel.id },
        keys().map((position) => {
          const token = tokenSpan(position);
          const at = { query: position, key: Math.min(position, subjectLast) };
          token.addEventListener("pointerenter", () => hoverCell(at));
          token.addEventListener("pointerleave", () => hoverCell(null));
          token.addEventListener("click", () => pinCell(at));
          return token;
        }),
      ),
    ]),
  );
}

function tokenSpan(position) {
  return el(
    "span",
    { class: `tok${tokenClass(position)}`, title: `token ${position}`, "data-position": position },
    el("bdi", { text: tokenText(data.tokens[position]) }),
  );
}

function paintStrips(query) {
  const name = selectedName();
  for (const strip of byId("strips").querySelectorAll("[data-strip]")) {
    const panel = panels.find((candidate) => candidate.id === strip.dataset.strip);
    for (const token of strip.children) {
      const position = Number(token.dataset.position);
      const value = panel.value(name, query, position);
      token.classList.toggle("from", position === query);
      token.classList.toggle("after", position > query && !value);
      if (position > query && !value) {
        token.style.backgroundColor = "";
        token.classList.remove("deep", "pale", "missing");
      } else {
        paintNode(token, patternScale, value);
      }
    }
  }
}

function drawRowTable(query) {
  byId("row-summary").replaceChildren(
    "The row of ",
    el("bdi", { text: quoted(query) }),
    ` (${query}) as a table`,
  );
  if (!byId("row-details").open) return;
  const name = selectedName();
  const rows = keys()
    .filter((key) => key <= query)
    .map((key) => [
      `${key}  ${tokenText(data.tokens[key])}`,
      ...panels.map((panel) => panel.format(panel.value(name, query, key))),
    ]);
  byId("row-table").replaceChildren(
    simpleTable(["To token", ...panels.map((panel) => panel.label)], rows, "small"),
  );
}

function watchPanelKeys() {
  const box = byId("panels");
  box.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const at = currentCell();
    const [x, y] = [keys().indexOf(at.key), queries().indexOf(at.query)];
    const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[
      event.key
    ];
    if (step) {
      hoverCell({
        key: keys()[clamp(x + step[0], 0, keys().length - 1)],
        query: queries()[clamp(y + step[1], 0, queries().length - 1)],
      });
      showCross();
    } else if (event.key === "Enter" || event.key === " ") {
      pinCell(at);
    } else {
      return;
    }
    event.preventDefault();
  });
  box.addEventListener("blur", () => hoverCell(null));
  byId("row-details").addEventListener("toggle", drawCross);
  document.addEventListener("keydown", (event) => {
    if (!pattern.keys || event.altKey || event.ctrlKey || event.metaKey || isTyping(event.target)) return;
    const panel = /^[1-9]$/.test(event.key) ? panels[Number(event.key) - 1] : undefined;
    if (!panel || panels.length === 1 || !patterns.has(selectedName())) return;
    switchPanel(panel);
    event.preventDefault();
  });
}

/** Would a character that is typed here become text? */
const isTyping = (node) =>
  node.matches("textarea, select, [contenteditable]") ||
  (node.matches("input") && !["radio", "checkbox", "range"].includes(node.type));
