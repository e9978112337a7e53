/* ---------- a layer x head map ---------- */

const maps = [];

/** The elements of a map: rows[layer][head] are its cells, the top row the last layer. */
function mapNodes() {
  const rows = [];
  const grid = el("div", {
    class: "grid",
    role: "grid",
    "aria-rowcount": layerCount,
    "aria-colcount": headCount + 1,
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
 * say what a cell shows now; `label()` names the whole map. With `choose(layer, head)`, cells
 * can also be chosen: by Space, with Shift, or by a plain click while `map.clickChooses`.
 */
function makeMap(host, { label, scale, value, describe, over, isChosen = null, choose = null }) {
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
    if (!at) return;
    if (choose && (event.shiftKey || map.clickChooses)) choose(at.layer, at.head);
    else selectHead(at.layer, at.head);
  });
  grid.addEventListener("keydown", (event) => {
    const at = place(event.target);
    if (!at || event.altKey || event.ctrlKey || event.metaKey) return;
    if (choose && event.key === " ") choose(at.layer, at.head);
    else if (event.key === "Enter" || event.key === " ") selectHead(at.layer, at.head);
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

  /** What is marked at a cell besides its value. */
  const marks = (layer, head) => ({
    over: over(layer, head),
    chosen: isChosen !== null && isChosen(layer, head),
  });
  const map = { node, label, scale, value, marks, clickChooses: false };
  map.paint = () => {
    grid.setAttribute("aria-label", label());
    rows.forEach((cells, layer) =>
      cells.forEach((cell, head) => {
        paintNode(cell, scale(), value(layer, head));
        for (const [mark, on] of Object.entries(marks(layer, head))) cell.classList.toggle(mark, on);
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
