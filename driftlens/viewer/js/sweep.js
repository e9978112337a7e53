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
      `Layer ${layer}, head ${head}: recovered share ${formatShare(heads[layer][head])}` +
      (isChosen(layer, head) ? ", chosen" : ""),
    over: () => false,
    ...(data.restored ? { isChosen, choose: toggleChosen } : {}),
  });
  byId("window-figure").hidden = !windows.length;
  byId("sweep-table").append(
    simpleTable(
      ["Restored", "Recovered share"],
      [
        ...windows.map(([start, end, share]) => [setButton(start, end), formatShare(share)]),
        ...layers.map((share, layer) => [setButton(layer, layer + 1), formatShare(share)]),
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
  drawRestored();
}

/** The name of some layers; where answers are known, a button that chooses all their heads. */
function setButton(start, end) {
  const text = windowLabel(start, end);
  if (!data.restored) return text;
  const button = el("button", { type: "button", class: "link", text });
  button.addEventListener("click", () => choose(headsOfLayers(start, end)));
  return button;
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
      el("b", { text: formatShare(share) }),
    );
  });
  hit.addEventListener("pointerleave", () => {
    mark.classList.remove("on");
    byId("chart-readout").replaceChildren();
  });
}
