/*
 * Draws the page from the JSON block #data. Nothing is loaded, nothing is stored.
 *
 * Texts from the data reach the document only as text nodes and attribute values, never
 * as markup. Order of this file: small helpers, colour and scales, the layer x head map
 * (used twice), the matrices of one head, charts, plain tables, PNG export, start.
 */
(() => {
  "use strict";

  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const [reference, ...others] = data.states;
  const subjectLast = data.subject[1] - 1;
  const layerCount = data.attention[reference.id].length;
  const headCount = data.attention[reference.id][0].length;
  const patterns = new Map(data.patterns);

  const MAX_TOKENS = 64; // tokens along one side of a matrix; beyond, a window of them
  const MIN_CELL = 11; // px of a matrix cell: below, neighbouring labels would overlap
  const MAX_CELL = 24;
  const PANEL_GAP = 16; // as in the style sheet
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const MINUS = "\u2212";
  const NOT_COMPUTED = "not computed";

  /* ---------- helpers ---------- */

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

  /* ---------- colour ---------- */

  // Probability, divergence: one hue, from paper to ink. Signed scales: blue to orange
  // and purple to green, both safe for the common kinds of colour blindness.
  const PALETTES = {
    light: {
      probability: ["#f6f6f4", "#d3e5e2", "#9ccac4", "#5ba8a4", "#267b80", "#0b515b", "#052c36"],
      divergence: ["#f6f6f4", "#e2dcec", "#c3b4da", "#9d86c2", "#775aa5", "#543283", "#331457"],
      difference: [
        "#0a3a6b",
        "#2166ac",
        "#4a93c7",
        "#a3cce3",
        "#f6f6f4",
        "#fdd2a0",
        "#ee9a3a",
        "#bd5f08",
        "#7d3a05",
      ],
      share: [
        "#40125c",
        "#75388d",
        "#a47cb6",
        "#d3bedb",
        "#f6f6f4",
        "#bfe0bd",
        "#6fb374",
        "#2a7d42",
        "#064521",
      ],
    },
    dark: {
      probability: ["#20252a", "#1a3a3f", "#1b5a5f", "#2f8285", "#5fafac", "#a3d6cd", "#eaf7f2"],
      divergence: ["#20252a", "#33294a", "#513c78", "#7557a6", "#9d82c9", "#c6b3e3", "#f0e9fa"],
      difference: [
        "#d5ebfa",
        "#86bfe4",
        "#3b8cc8",
        "#1f5688",
        "#20252a",
        "#7a4310",
        "#c97518",
        "#f5ab54",
        "#feeacf",
      ],
      share: [
        "#ecdcf5",
        "#c39ad6",
        "#9160a9",
        "#563268",
        "#20252a",
        "#205a33",
        "#3a9352",
        "#84cb8f",
        "#dcf5dd",
      ],
    },
  };

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const palette = (name) => PALETTES[isDark() ? "dark" : "light"][name];
  const cssColour = (rgb) => `rgb(${rgb.map(Math.round).join(", ")})`;

  /** Colour at `t` in [0, 1] between equally spaced stops. */
  function mix(stops, t) {
    const at = clamp(t, 0, 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const [from, to] = [channels(stops[low]), channels(stops[low + 1])];
    return from.map((value, i) => value + (to[i] - value) * (at - low));
  }

  /** Is white the better mark on this colour? By relative luminance. */
  function isDeep([r, g, b]) {
    const linear = [r, g, b].map((v) => (v / 255) ** 2.2);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.3;
  }

  /** The next round number above: a legend that ends at 0.4 reads better than at 0.3871. */
  function roundUp(value) {
    if (!(value > 0)) return 1;
    const power = 10 ** Math.floor(Math.log10(value));
    const step = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((s) => s * power >= value * (1 - 1e-9));
    return Number((step * power).toPrecision(3));
  }

  /**
   * One colour scale, with its legend and the field that fixes its maximum.
   *
   * `extent()` gives the lowest and highest of all numbers that share the scale;
   * `signed` makes it symmetric around 0; `changed()` is called when the reader fixes
   * or frees the maximum.
   */
  function makeScale({ id, title, colours, signed = false, extent, changed }) {
    const scale = { fixed: null, signed, title, colours };

    scale.refresh = () => {
      const { low, high } = extent();
      scale.low = low;
      scale.high = high;
      scale.automatic = roundUp(signed ? Math.max(-low, high) : high);
      scale.max = scale.fixed ?? scale.automatic;
    };
    scale.rgb = (value) => mix(palette(colours), signed ? (value / scale.max + 1) / 2 : value / scale.max);
    scale.ticks = () =>
      (signed ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]).map((part) => {
        const value = part * scale.max;
        const beyond =
          part === 1 && scale.high > scale.max * 1.000001
            ? "\u2265 "
            : part === -1 && scale.low < -scale.max * 1.000001
              ? "\u2264 "
              : "";
        const sign = signed && value > 0 && !beyond ? "+" : "";
        return beyond + sign + format(value, 3);
      });

    const ramp = el("div", { class: "colours" });
    const ticks = el("div", { class: "ticks" });
    const field = el("input", {
      type: "number",
      min: "0",
      step: "any",
      id: `${id}-max`,
      inputmode: "decimal",
    });
    const auto = el("button", {
      type: "button",
      text: "Auto",
      "aria-label": `Automatic maximum: ${title}`,
    });
    const setMaximum = (value) => {
      scale.fixed = value;
      scale.refresh();
      changed();
    };
    field.addEventListener("input", () => {
      const value = Number(field.value);
      const valid = field.value !== "" && Number.isFinite(value) && value > 0;
      field.setAttribute("aria-invalid", String(!valid));
      if (valid) setMaximum(value);
    });
    field.addEventListener("change", () => scale.draw());
    auto.addEventListener("click", () => {
      setMaximum(null);
      scale.draw();
    });
    scale.node = el(
      "div",
      { class: "scale", "data-scale": id },
      el("div", { class: "title", text: title }),
      el("div", { class: "ramp" }, ramp, ticks),
      el("div", { class: "fix" }, el("label", { for: `${id}-max`, text: "Maximum" }), field, auto),
    );

    /** Redraw the legend; the field is left alone while the reader types in it. */
    scale.draw = () => {
      ramp.style.background = `linear-gradient(to right, ${palette(colours).join(", ")})`;
      ticks.replaceChildren(...scale.ticks().map((text) => el("span", { text })));
      if (document.activeElement !== field) {
        field.value = String(scale.max);
        field.setAttribute("aria-invalid", "false");
      }
      auto.disabled = scale.fixed === null;
    };
    scale.refresh();
    return scale;
  }

  /** Lowest and highest of some [row, column] grids, and 0. Skips the first `skip` of both. */
  function extentOf(grids, skip = 0) {
    const extent = { low: 0, high: 0 };
    for (const grid of grids) {
      for (let i = skip; i < grid.length; i++) {
        for (let j = skip; j < grid[i].length; j++) {
          const value = grid[i][j];
          if (value === null) continue;
          if (value < extent.low) extent.low = value;
          if (value > extent.high) extent.high = value;
        }
      }
    }
    return extent;
  }

  /** Give a node the colour of a value, and let its marks contrast with it. */
  function paintNode(node, scale, value) {
    node.classList.toggle("missing", value === null);
    if (value === null) {
      node.style.backgroundColor = "";
      node.classList.toggle("deep", isDark());
      node.classList.toggle("pale", !isDark());
      return;
    }
    const rgb = scale.rgb(value);
    node.style.backgroundColor = cssColour(rgb);
    node.classList.toggle("deep", isDeep(rgb));
    node.classList.toggle("pale", !isDeep(rgb));
  }

  /* ---------- what can be looked at ---------- */

  const changes = new Map(); // per state, attention minus that of the reference

  /** SADR's rule: more attention to the subject than any head of the layer paid before. */
  function overAttends(state, layer, head) {
    const value = data.attention[state.id][layer][head];
    const before = data.attention[reference.id][layer].filter((v) => v !== null);
    return state !== reference && value !== null && before.length > 0 && value > Math.max(...before);
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

  /* ---------- a layer x head map ---------- */

  const maps = [];

  /** The elements of a map: rows[layer][head] are its cells, the top row the last layer. */
  function mapNodes() {
    const rows = [];
    const grid = el("div", {
      class: "grid",
      role: "grid",
      "aria-rowcount": layerCount,
      "aria-colcount": headCount,
    });
    for (const layer of range(0, layerCount).reverse()) {
      const cells = range(0, headCount).map((head) =>
        el("div", {
          class: patterns.has(headName(layer, head)) ? "cell stored" : "cell",
          role: "gridcell",
          tabindex: "-1",
          "data-layer": layer,
          "data-head": head,
        }),
      );
      rows[layer] = cells;
      grid.append(
        el(
          "div",
          { class: "row", role: "row" },
          el("span", { class: "tick", role: "rowheader", "aria-label": `Layer ${layer}` }),
          cells,
        ),
      );
    }
    const ticks = el(
      "div",
      { class: "ticks", "aria-hidden": "true" },
      el("span"),
      range(0, headCount).map(() => el("span")),
    );
    const node = el(
      "div",
      { class: "map" },
      el("span", { class: "axis-y", text: "layer" }),
      grid,
      ticks,
      el("span", { class: "axis-x", text: "head" }),
    );
    return { node, grid, rows, ticks };
  }

  /**
   * A map of coloured cells with layers upwards and heads to the right.
   *
   * `value(layer, head)`, `scale()`, `describe(layer, head)` and `over(layer, head)`
   * say what a cell shows now; `label()` names the whole map.
   */
  function makeMap(host, { label, scale, value, describe, over }) {
    const { node, grid, rows, ticks } = mapNodes();
    host.replaceChildren(node);

    let home = { layer: layerCount - 1, head: 0 }; // the one cell that Tab reaches
    const setHome = (layer, head) => {
      rows[home.layer][home.head].tabIndex = -1;
      home = { layer, head };
      rows[layer][head].tabIndex = 0;
    };
    setHome(home.layer, home.head);
    const place = (target) => {
      const cell = target.closest?.(".cell");
      return cell ? { layer: Number(cell.dataset.layer), head: Number(cell.dataset.head) } : null;
    };

    grid.addEventListener("pointerover", (event) => hoverHead(place(event.target)));
    grid.addEventListener("pointerleave", () => hoverHead(null));
    grid.addEventListener("focusin", (event) => {
      const at = place(event.target);
      setHome(at.layer, at.head);
      hoverHead(at);
    });
    grid.addEventListener("focusout", () => hoverHead(null));
    grid.addEventListener("click", (event) => {
      const at = place(event.target);
      if (at) selectHead(at.layer, at.head);
    });
    grid.addEventListener("keydown", (event) => {
      const at = place(event.target);
      if (!at || event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "Enter" || event.key === " ") selectHead(at.layer, at.head);
      else if (!moveTo(at, event.key)) return;
      event.preventDefault();
    });
    function moveTo(at, key) {
      const goal = {
        ArrowUp: [at.layer + 1, at.head],
        ArrowDown: [at.layer - 1, at.head],
        ArrowLeft: [at.layer, at.head - 1],
        ArrowRight: [at.layer, at.head + 1],
        Home: [at.layer, 0],
        End: [at.layer, headCount - 1],
        PageUp: [layerCount - 1, at.head],
        PageDown: [0, at.head],
      }[key];
      if (!goal) return false;
      rows[clamp(goal[0], 0, layerCount - 1)][clamp(goal[1], 0, headCount - 1)].focus();
      return true;
    }

    const map = { node, label, scale, value };
    map.paint = () => {
      grid.setAttribute("aria-label", label());
      rows.forEach((cells, layer) =>
        cells.forEach((cell, head) => {
          paintNode(cell, scale(), value(layer, head));
          cell.classList.toggle("over", over(layer, head));
          cell.setAttribute("aria-label", describe(layer, head));
          cell.setAttribute("aria-selected", String(sameHead(ui.selected, { layer, head })));
        }),
      );
    };
    map.link = (at) => {
      grid.querySelector(".linked")?.classList.remove("linked");
      if (at) rows[at.layer][at.head].classList.add("linked");
    };
    /** Choose cell sizes for the room there is, and drop tick labels that would touch. */
    map.fit = (room) => {
      const width = clamp(Math.floor((room - 60) / headCount), 12, 44);
      const height = clamp(Math.floor(540 / layerCount), 11, 20);
      node.style.setProperty("--heads", headCount);
      node.style.setProperty("--cell-width", `${width}px`);
      node.style.setProperty("--cell-height", `${height}px`);
      const everyHead = width >= 18 ? 1 : headCount > 40 ? 4 : 2;
      const everyLayer = height >= 14 ? 1 : layerCount > 40 ? 4 : 2;
      [...ticks.children].slice(1).forEach((tick, head) => {
        tick.textContent = head % everyHead === 0 ? String(head) : "";
      });
      rows.forEach((cells, layer) => {
        cells[0].previousSibling.textContent = layer % everyLayer === 0 ? String(layer) : "";
      });
    };
    maps.push(map);
    return map;
  }

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
    const { layer, head } = at;
    const name = headName(layer, head);
    const tags = [
      ...others
        .filter((state) => overAttends(state, layer, head))
        .map((state) => `over-attends: ${inert(state.label)}`),
      patterns.has(name) ? "pattern stored" : "values only, no pattern stored",
    ];
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
        el("p", { class: "recovers", text: `Restoring this head alone recovers: ${format(share)}` }),
      );
    }
    if (sameHead(at, ui.selected) && patterns.has(name)) {
      const go = el("button", { type: "button", text: "See its matrices below" });
      go.addEventListener("click", () =>
        byId("head").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" }),
      );
      children.push(go);
    }
    box.replaceChildren(...children);
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
          columns.map((text, i) => el("th", { scope: "col", class: i ? "number" : null, text })),
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
              i ? el("td", { class: "number", text }) : el("th", { scope: "row", text }),
            ),
          ),
        ),
      ),
    );
  }

  /* ---------- the matrices of one head ---------- */

  const pattern = {
    hovered: null, // {query, key} under the pointer or the arrow keys
    pinned: null,
    hideFirst: false,
    firstQuery: 0, // start of the windows, for prompts of more than MAX_TOKENS tokens
    firstKey: 0,
    shown: new Set(), // ids of the panels
    cell: MAX_CELL,
  };
  // Without a BOS token the first token is a sink all the same; but never hide the subject.
  const canHideFirst = data.subject[0] > 0 && data.query > 0;

  /** Everything that a panel can show of head `name`: each state, and each change. */
  const panels = data.states.flatMap((state) => {
    const before = (name) => patterns.get(name)[reference.id];
    const after = (name) => patterns.get(name)[state.id];
    const plain = {
      id: `state-${state.id}`,
      label: inert(state.label),
      state,
      signed: false,
      format,
      value: (name, query, key) => after(name)[query][key],
    };
    const change = {
      id: `change-${state.id}`,
      label: changeLabel(state),
      state,
      signed: true,
      format: formatChange,
      value: (name, query, key) => minus(after(name)[query][key], before(name)[query][key]),
    };
    return state === reference ? [plain] : [plain, change];
  });

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
    // The change of the first other state is the point; further changes can be switched on.
    pattern.shown = new Set(
      panels.filter((panel) => !panel.signed || panel.state === others[0]).map((panel) => panel.id),
    );
  }

  const isHidden = (position) => pattern.hideFirst && position === 0;
  const windowOf = (first) =>
    range(first, Math.min(first + MAX_TOKENS, data.tokens.length)).filter((i) => !isHidden(i));
  const queries = () => windowOf(pattern.firstQuery);
  const keys = () => windowOf(pattern.firstKey);

  /** Over all stored heads and the whole prompt, so that no choice of view moves the scale. */
  function storedExtent(signed) {
    const skip = pattern.hideFirst ? 1 : 0;
    const grids = [...patterns.values()].flatMap((byState) =>
      signed
        ? others.map((state) => subtract(byState[state.id], byState[reference.id]))
        : Object.values(byState),
    );
    return extentOf(grids, skip);
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

  function tokenClass(position) {
    const [start, end] = data.subject;
    return (
      (position >= start && position < end ? " subject" : "") + (position === data.query ? " query" : "")
    );
  }

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

  function makePanelChoice() {
    const boxes = panels.map((panel) => {
      const input = el("input", { type: "checkbox", value: panel.id });
      input.addEventListener("change", () => {
        if (input.checked) pattern.shown.add(panel.id);
        else if (pattern.shown.size > 1) pattern.shown.delete(panel.id);
        buildPanels();
      });
      return el("label", {}, input, panel.label);
    });
    const hide = el("input", { type: "checkbox", id: "hide-first" });
    hide.addEventListener("change", () => {
      pattern.hideFirst = hide.checked;
      patternScale.refresh();
      patternChangeScale.refresh();
      buildPanels();
    });
    const hideText = data.bos ? "Hide the BOS token" : "Hide the first token";
    byId("panel-choice").replaceChildren(
      el("fieldset", {}, el("legend", { text: "Side by side" }), el("div", { class: "segments" }, boxes)),
      ...(canHideFirst ? [el("label", { class: "check" }, hide, hideText)] : []),
    );
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
    const shown = panels.filter((panel) => pattern.shown.has(panel.id));
    for (const input of byId("panel-choice").querySelectorAll(".segments input")) {
      input.checked = pattern.shown.has(input.value);
    }
    if (byId("hide-first")) byId("hide-first").checked = pattern.hideFirst;
    byId("pattern-scales").replaceChildren(
      ...[
        shown.some((panel) => !panel.signed) ? patternScale.node : null,
        shown.some((panel) => panel.signed) ? patternChangeScale.node : null,
      ].filter(Boolean),
    );

    const longest = Math.max(...queries().map((position) => tokenText(data.tokens[position]).length));
    const labelWidth = clamp(longest * 7 + 40, 60, box.clientWidth < 560 ? 92 : 124);
    // On a narrow screen one panel fills the box; the edge of the next invites a swipe.
    const narrow = box.clientWidth < 700;
    const side = narrow ? 1 : shown.length;
    const room =
      (box.clientWidth - labelWidth - PANEL_GAP * side - (narrow ? 32 : 8)) / (side * keys().length);
    pattern.cell = clamp(Math.floor(room), MIN_CELL, MAX_CELL);

    box.replaceChildren(queryLabels(labelWidth), ...shown.map(makePanel));
    box.setAttribute(
      "aria-label",
      `Attention matrices of head ${selectedName()}: arrow keys move, Enter pins`,
    );
    drawWindowChoice();
    makeStrips(shown);
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
    const canvas = el("canvas", {
      role: "img",
      "aria-label": `${panel.label}: matrix; its values are in the table below`,
    });
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
    return el(
      "div",
      { class: "panel" },
      el("h3", { text: panel.label }),
      sheet,
      labels,
      el("div", { class: "key-title", text: "to \u2192" }),
    );
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
      drawMatrix(context, panel, name);
    }
    drawCross();
  }

  function drawMatrix(context, panel, name) {
    const { cell } = pattern;
    queries().forEach((query, y) =>
      keys().forEach((key, x) => {
        const value = panel.value(name, query, key);
        if (key > query && !value) return; // causal mask: nothing to attend to, so no colour
        drawCell(context, scaleOf(panel), value, x * cell, y * cell, cell - 1, cell - 1);
      }),
    );
  }

  function drawCell(context, scale, value, x, y, width, height) {
    context.fillStyle = value === null ? themeColour("--raised") : cssColour(scale.rgb(value));
    context.fillRect(x, y, width, height);
    if (value !== null) return;
    context.strokeStyle = themeColour("--faint");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x + 1, y + height - 1);
    context.lineTo(x + width - 1, y + 1);
    context.stroke();
  }

  const themeColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

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

  function drawCellReadout(query, key) {
    const name = selectedName();
    const values = panels.map((panel) =>
      el(
        "span",
        { class: "pair" },
        `${panel.label} `,
        el("b", { text: panel.format(panel.value(name, query, key)) }),
      ),
    );
    const where = el(
      "span",
      { class: "pair" },
      "From ",
      el("b", {}, el("bdi", { text: quoted(query) })),
      ` (${query}) to `,
      el("b", {}, el("bdi", { text: quoted(key) })),
      ` (${key})`,
      pattern.pinned && !pattern.hovered ? ", pinned" : "",
    );
    byId("cell-readout").replaceChildren(where, ...values);
  }

  /** The prompt once per state, shaded by the attention from the current row. */
  function makeStrips(shown) {
    const box = byId("strips");
    box.replaceChildren(
      ...shown
        .filter((panel) => !panel.signed)
        .flatMap((panel) => [
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
      } else if (event.key === "Enter" || event.key === " ") {
        pinCell(at);
      } else {
        return;
      }
      event.preventDefault();
    });
    box.addEventListener("blur", () => hoverCell(null));
    byId("row-details").addEventListener("toggle", drawCross);
  }

  /* ---------- sweep ---------- */

  let sweepMap = null;
  let sweepScale = null;

  function makeSweep() {
    if (!data.sweep) return;
    const { heads, layers, windows, caption } = data.sweep;
    byId("sweep").hidden = false;
    byId("sweep-caption").textContent = inert(caption);
    sweepScale = makeScale({
      id: "share",
      title: "Recovered share of the lost probability: 1 is all of it",
      colours: "share",
      signed: true,
      extent: () => extentOf([heads]),
      changed: () => drawSweep(),
    });
    byId("sweep-scale").append(sweepScale.node);
    sweepMap = makeMap(byId("sweep-map"), {
      label: () => "Recovered share, one head restored. Layers by heads.",
      scale: () => sweepScale,
      value: (layer, head) => heads[layer][head],
      describe: (layer, head) =>
        `Layer ${layer}, head ${head}: recovered share ${format(heads[layer][head])}`,
      over: () => false,
    });
    byId("window-figure").hidden = !windows.length;
    byId("sweep-table").append(
      simpleTable(
        ["Restored", "Recovered share"],
        [
          ...windows.map(([start, end, share]) => [windowLabel(start, end), format(share)]),
          ...layers.map((share, layer) => [`layer ${layer}`, format(share)]),
        ],
        "small",
      ),
    );
  }

  function drawSweep() {
    if (!data.sweep) return;
    sweepScale.draw();
    sweepMap.paint();
    drawCharts();
  }

  const windowLabel = (start, end) =>
    end - start === 1 ? `layer ${start}` : `layers ${start}\u2013${end - 1}`;

  /** Both charts: one axis of layers, one of shares, so that they can be compared. */
  function drawCharts() {
    const { layers, windows } = data.sweep;
    const values = [...layers, ...windows.map(([, , share]) => share)].filter((share) => share !== null);
    const axis = shareAxis(Math.min(0, ...values), Math.max(0, ...values));
    const bars = chartFrame(byId("layer-chart"), axis);
    layers.forEach((share, layer) => drawBar(bars, layer, share));
    byId("layer-chart").setAttribute(
      "aria-label",
      "Bars: recovered share by restored layer. The table below has the numbers.",
    );
    if (!windows.length) return;
    const spans = chartFrame(byId("window-chart"), axis);
    windows.forEach(([start, end, share]) => drawSpan(spans, start, end, share));
    byId("window-chart").setAttribute(
      "aria-label",
      "Lines: recovered share by restored window of layers. The table below has the numbers.",
    );
  }

  /** Round limits and four to seven round ticks that hold `low` and `high`. */
  function shareAxis(low, high) {
    const span = Math.max(high - low, 1e-6);
    const power = 10 ** Math.floor(Math.log10(span));
    const step = [0.1, 0.2, 0.25, 0.5, 1].map((s) => s * power).find((s) => span / s <= 6) ?? 2 * power;
    const [first, last] = [Math.floor(low / step), Math.ceil(high / step)];
    return {
      low: first * step,
      high: last * step,
      ticks: range(first, last + 1).map((i) => Number((i * step).toPrecision(6))),
    };
  }

  function svgEl(svg, name, attributes, text) {
    // The element in the page knows its namespace, so that no address is written here.
    const node = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
    return node;
  }

  function chartFrame(svg, axis) {
    const width = Math.max(240, svg.parentElement.clientWidth);
    const box = { left: 40, right: width - 6, top: 8, bottom: 152 };
    const x = (layer) => box.left + ((box.right - box.left) * layer) / layerCount;
    const y = (share) =>
      box.bottom - ((box.bottom - box.top) * (share - axis.low)) / (axis.high - axis.low || 1);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} 190`);
    for (const tick of axis.ticks) {
      const kind = tick === 0 ? "axis" : tick === 1 ? "full" : "level";
      svgEl(svg, "line", { class: kind, x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) });
      svgEl(svg, "text", { x: box.left - 7, y: y(tick) + 4, "text-anchor": "end" }, format(tick, 4));
    }
    const step = [1, 2, 5, 10].find((s) => x(s) - x(0) >= 24) ?? 20;
    for (let layer = 0; layer < layerCount; layer += step) {
      svgEl(
        svg,
        "text",
        { x: (x(layer) + x(layer + 1)) / 2, y: box.bottom + 15, "text-anchor": "middle" },
        String(layer),
      );
    }
    svgEl(
      svg,
      "text",
      { x: (box.left + box.right) / 2, y: box.bottom + 32, "text-anchor": "middle" },
      "layer",
    );
    return { svg, x, y, box };
  }

  function drawBar({ svg, x, y, box }, layer, share) {
    const width = Math.max(2, (x(1) - x(0)) * 0.72);
    const left = (x(layer) + x(layer + 1)) / 2 - width / 2;
    const mark =
      share === null
        ? svgEl(svg, "line", {
            class: "void",
            x1: left + width / 2,
            x2: left + width / 2,
            y1: box.top,
            y2: box.bottom,
          })
        : svgEl(svg, "rect", {
            class: share < 0 ? "mark negative" : "mark",
            x: left,
            width,
            y: y(Math.max(share, 0)),
            height: Math.max(1, Math.abs(y(share) - y(0))),
          });
    const hit = svgEl(svg, "rect", {
      class: "hit",
      x: x(layer),
      width: x(1) - x(0),
      y: box.top,
      height: box.bottom - box.top,
    });
    watchMark(hit, mark, `layer ${layer}`, share);
  }

  function drawSpan({ svg, x, y, box }, start, end, share) {
    const at = share === null ? box.bottom : y(share);
    const mark = svgEl(svg, "line", {
      class: share === null ? "void" : share < 0 ? "span negative" : "span",
      x1: x(start) + 1.5,
      x2: x(end) - 1.5,
      y1: at,
      y2: at,
    });
    const hit = svgEl(svg, "line", {
      class: "hit",
      x1: x(start),
      x2: x(end),
      y1: at,
      y2: at,
      "stroke-width": 10,
    });
    watchMark(hit, mark, windowLabel(start, end), share);
  }

  function watchMark(hit, mark, label, share) {
    hit.addEventListener("pointerenter", () => {
      mark.classList.add("on");
      byId("chart-readout").replaceChildren(
        `Restored: ${label}. Recovered share `,
        el("b", { text: format(share) }),
      );
    });
    hit.addEventListener("pointerleave", () => {
      mark.classList.remove("on");
      byId("chart-readout").replaceChildren();
    });
  }

  /* ---------- texts and tables ---------- */

  function makeTexts() {
    byId("title").textContent = inert(data.title);
    byId("subtitle").textContent = inert(data.subtitle);
    byId("summary").replaceChildren(...data.summary.map((text) => el("p", { text: inert(text) })));
    byId("facts").replaceChildren(
      ...data.facts.flatMap(([label, value]) => [
        el("dt", { text: inert(label) }),
        el("dd", { text: inert(value) }),
      ]),
    );
    byId("prompt").replaceChildren(...data.tokens.map((_, position) => tokenSpan(position)));
    byId("prompt-key").replaceChildren(...promptKey());
    byId("pattern-key").replaceChildren(...promptKey());
    byId("overview-note").replaceChildren(
      "Attention from ",
      el("bdi", { text: quoted(data.query) }),
      ` (token ${data.query}, the row under study) to `,
      el("bdi", { text: quoted(subjectLast) }),
      ` (token ${subjectLast}, the last of the subject), for every head.`,
    );
    byId("overview-key").replaceChildren(
      keyItem("stored", "pattern stored: open it with a click"),
      ...(others.length
        ? [keyItem("over", `over-attends: more than any head of its layer in ${inert(reference.label)}`)]
        : []),
    );
  }

  const promptKey = () => [keyItem("subject", "subject"), keyItem("query", "row under study")];

  function keyItem(kind, text) {
    return el("span", { class: "item" }, el("span", { class: `sample ${kind}` }), text);
  }

  function makeAnswers() {
    if (!data.probabilities.length) return;
    byId("answers").hidden = false;
    const gauge = (value, kind) => {
      const fill = el("div", { class: "fill" });
      fill.style.width = `${100 * clamp(value ?? 0, 0, 1)}%`;
      return el(
        "td",
        {},
        el(
          "div",
          { class: `gauge ${kind}${value === null ? " missing" : ""}` },
          el("div", { class: "track" }, value === null ? null : fill),
          el("span", { class: "number", title: format(value), text: formatColumn([value])(value) }),
        ),
      );
    };
    const heading = (answer, role) =>
      el("th", { scope: "col" }, "P(", el("bdi", { text: inert(answer) }), `), ${role}`);
    byId("answers-table").append(
      el(
        "table",
        { class: "answers" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }),
            heading(data.answer, "true answer"),
            heading(data.targetNew, "edit\u2019s target"),
          ),
        ),
        el(
          "tbody",
          {},
          data.probabilities.map(([label, answer, target]) =>
            el(
              "tr",
              {},
              el("th", { scope: "row", text: inert(label) }),
              gauge(answer, "answer"),
              gauge(target, "target"),
            ),
          ),
        ),
      ),
    );
  }

  function makeTables() {
    if (!data.tables.length) return;
    byId("tables").hidden = false;
    byId("tables-body").replaceChildren(
      ...data.tables.map((table) => {
        const columns = table.columns.map((_, i) =>
          table.rows.map((row) => row[i]).filter((cell) => typeof cell !== "string"),
        );
        const kinds = columns.map((cells) => (cells.some((cell) => cell !== null) ? "number" : null));
        const formats = columns.map(formatColumn);
        const label = inert(table.caption);
        return el(
          "figure",
          {},
          el("figcaption", { text: label }),
          el(
            "div",
            { class: "scroll" },
            el(
              "table",
              { "aria-label": label },
              el(
                "thead",
                {},
                el(
                  "tr",
                  {},
                  table.columns.map((text, i) =>
                    el("th", { scope: "col", class: kinds[i], text: inert(text) }),
                  ),
                ),
              ),
              el(
                "tbody",
                {},
                table.rows.map((row) =>
                  el(
                    "tr",
                    {},
                    row.map((cell, i) => tableCell(cell, kinds[i], formats[i])),
                  ),
                ),
              ),
            ),
          ),
        );
      }),
    );
  }

  function tableCell(cell, kind, formatted) {
    const at = typeof cell === "string" ? parseHead(cell) : null;
    if (at) return el("td", {}, headButton(at.layer, at.head));
    const text = typeof cell === "string" ? inert(cell) : formatted(cell);
    return el("td", { class: kind, text });
  }

  /* ---------- PNG export ---------- */

  const EXPORT_SCALE = 2; // pixels per unit: sharp in print

  /** A canvas of the given size in the page's colours, and its context. */
  function makeSheet(width, height) {
    const canvas = el("canvas", {
      width: Math.ceil(width * EXPORT_SCALE),
      height: Math.ceil(height * EXPORT_SCALE),
    });
    const context = canvas.getContext("2d");
    context.scale(EXPORT_SCALE, EXPORT_SCALE);
    context.fillStyle = themeColour("--bg");
    context.fillRect(0, 0, width, height);
    context.textBaseline = "middle";
    return { canvas, context };
  }

  function write(
    context,
    text,
    x,
    y,
    { size = 11, align = "left", colour = "--muted", weight = "", family = "--sans" } = {},
  ) {
    context.font = `${weight} ${size}px ${themeColour(family)}`;
    context.textAlign = align;
    context.fillStyle = themeColour(colour);
    context.fillText(text, x, y);
  }

  function writeUpwards(context, text, x, y, options) {
    context.save();
    context.translate(x, y);
    context.rotate(-Math.PI / 2);
    write(context, text, 0, 0, options);
    context.restore();
  }

  /** The colour bar of a scale. */
  function drawRamp(context, scale, x, y, width) {
    write(context, scale.title, x, y);
    for (const i of range(0, width)) {
      context.fillStyle = cssColour(mix(palette(scale.colours), i / (width - 1)));
      context.fillRect(x + i, y + 10, 1.5, 9);
    }
    const ticks = scale.ticks();
    ticks.forEach((text, i) =>
      write(context, text, x + (width * i) / (ticks.length - 1), y + 29, {
        size: 10,
        align: i === 0 ? "left" : i === ticks.length - 1 ? "right" : "center",
      }),
    );
  }

  function drawMapImage(map) {
    const [cellWidth, cellHeight, left, top] = [
      clamp(Math.round(520 / headCount), 14, 36),
      clamp(Math.round(540 / layerCount), 11, 20),
      56,
      40,
    ];
    const [width, height] = [headCount * cellWidth, layerCount * cellHeight];
    const { canvas, context } = makeSheet(left + Math.max(width, 330) + 24, top + height + 100);
    write(context, map.label(), left, 20, { size: 13, weight: "600", colour: "--ink" });
    for (const layer of range(0, layerCount)) {
      const y = top + (layerCount - 1 - layer) * cellHeight;
      if (cellHeight >= 14 || layer % 4 === 0)
        write(context, String(layer), left - 7, y + cellHeight / 2, { align: "right", size: 10 });
      for (const head of range(0, headCount)) {
        drawCell(
          context,
          map.scale(),
          map.value(layer, head),
          left + head * cellWidth,
          y,
          cellWidth - 1,
          cellHeight - 1,
        );
      }
    }
    for (const head of range(0, headCount)) {
      if (cellWidth >= 18 || head % 4 === 0)
        write(context, String(head), left + (head + 0.5) * cellWidth, top + height + 10, {
          align: "center",
          size: 10,
        });
    }
    write(context, "head", left + width / 2, top + height + 27, { align: "center" });
    writeUpwards(context, "layer", 16, top + height / 2, { align: "center" });
    drawRamp(context, map.scale(), left, top + height + 52, 260);
    return canvas;
  }

  /** Cut a label to the room that there is for it. */
  const shortened = (text, length) =>
    [...text].length > length ? `${[...text].slice(0, length - 1).join("")}\u2026` : text;

  function drawPatternImage() {
    const name = selectedName();
    const shown = panels.filter((panel) => pattern.shown.has(panel.id));
    const { cell } = pattern;
    const [left, top, gap, below] = [120, 56, 20, 96];
    const [width, height] = [keys().length * cell, queries().length * cell];
    const { canvas, context } = makeSheet(
      left + Math.max(shown.length * (width + gap), 620) + 8,
      top + height + below + 60,
    );
    write(context, `Head ${name}`, 10, 20, { size: 13, weight: "600", colour: "--ink" });
    const colour = (position) =>
      tokenClass(position).includes("subject")
        ? "--subject"
        : position === data.query
          ? "--ink"
          : "--muted";
    queries().forEach((position, i) =>
      write(context, shortened(tokenText(data.tokens[position]), 15), left - 8, top + (i + 0.5) * cell, {
        size: 10,
        align: "right",
        family: "--mono",
        colour: colour(position),
      }),
    );
    shown.forEach((panel, i) => {
      context.save();
      context.translate(left + i * (width + gap), top);
      write(context, panel.label, 0, -14, { size: 12, weight: "600", colour: "--ink" });
      drawMatrix(context, panel, name);
      keys().forEach((position, x) =>
        writeUpwards(
          context,
          shortened(tokenText(data.tokens[position]), 13),
          (x + 0.5) * cell,
          height + 6,
          { size: 10, align: "right", family: "--mono", colour: colour(position) },
        ),
      );
      context.restore();
    });
    drawRamp(context, patternScale, left, top + height + below, 260);
    if (shown.some((panel) => panel.signed))
      drawRamp(context, patternChangeScale, left + 330, top + height + below, 260);
    return canvas;
  }

  function savePicture(canvas, name) {
    canvas.toBlob((blob) => {
      const address = URL.createObjectURL(blob);
      el("a", { href: address, download: `${name}.png` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 10000);
    });
  }

  function watchExport() {
    byId("overview-png").addEventListener("click", () =>
      savePicture(drawMapImage(overviewMap), `driftlens-${ui.view.id.replace(/[^\w-]/g, "_")}`),
    );
    byId("pattern-png").addEventListener("click", () =>
      savePicture(drawPatternImage(), `driftlens-${selectedName()}`),
    );
    byId("sweep-png").addEventListener("click", () =>
      savePicture(drawMapImage(sweepMap), "driftlens-recovered"),
    );
  }

  /* ---------- whole page ---------- */

  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosenTheme = null; // null: as the system says

  function applyTheme() {
    const theme = chosenTheme ?? (prefersDark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
  }

  function drawColours() {
    drawOverview();
    drawPanels();
    drawSweep();
  }

  function watchTheme() {
    byId("theme").addEventListener("click", () => {
      chosenTheme = isDark() ? "light" : "dark";
      applyTheme();
      drawColours();
    });
    prefersDark.addEventListener("change", () => {
      applyTheme();
      drawColours();
    });
  }

  function reset() {
    ui.view = startingView;
    ui.selected = firstStored;
    ui.marked = true;
    resetPattern();
    for (const scale of [
      attentionScale,
      changeScale,
      divergenceScale,
      patternScale,
      patternChangeScale,
      sweepScale,
    ]) {
      if (!scale) continue;
      scale.fixed = null;
      scale.refresh();
    }
    drawOverview();
    drawSelection();
    drawSweep();
  }

  /** Escape lets go of the innermost thing that is held: a pinned cell, then the head. */
  function release(event) {
    if (event.key !== "Escape") return;
    if (pattern.hovered || pattern.pinned) {
      pattern.hovered = null;
      pattern.pinned = null;
      if (patterns.has(selectedName())) drawCross();
    } else if (ui.selected) {
      ui.selected = null;
      drawSelection();
    }
  }

  function layOut() {
    const room = byId("overview").clientWidth;
    const beside = window.matchMedia("(min-width: 861px)").matches ? 340 : 0;
    overviewMap.fit(room - beside);
    sweepMap?.fit(room - beside);
    buildPanels();
    drawSweep();
  }

  function watchSize() {
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return; // a phone's address bar comes and goes
      width = window.innerWidth;
      requestAnimationFrame(layOut);
    });
  }

  function start() {
    applyTheme();
    makeTexts();
    makeAnswers();
    makeViewChoice();
    makePanelChoice();
    makeWindowChoice();
    makeSweep();
    makeTables();
    drawOverview();
    drawSelection();
    layOut();
    watchPanelKeys();
    watchExport();
    watchTheme();
    watchSize();
    byId("reset").addEventListener("click", reset);
    document.addEventListener("keydown", release);
  }

  start();
})();
