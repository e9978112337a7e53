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
