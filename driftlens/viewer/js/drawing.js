/* ---------- drawings: described once, painted on a canvas or written as SVG ---------- */

// A drawing is {width, height, title, items}; an item is one of the following, in px.

const themeColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const rectItem = (x, y, width, height, fill) => ({ kind: "rect", x, y, width, height, fill });
const lineItem = (x1, y1, x2, y2, stroke) => ({ kind: "line", x1, y1, x2, y2, stroke });

/** A bar that runs from left to right through equally spaced colours. */
const rampItem = (x, y, width, height, stops) => ({ kind: "ramp", x, y, width, height, stops });

/** A triangle of this size whose right angle is at (x, y), to the left and below. */
const cornerItem = (x, y, size, fill) => ({ kind: "corner", x, y, size, fill });

/** A line of text, centred vertically on `y`; `align` is left, center or right. */
const textItem = (
  text,
  x,
  y,
  {
    size = 11,
    align = "left",
    colour = "--muted",
    weight = "400",
    family = "--sans",
    upwards = false,
  } = {},
) => ({
  kind: "text",
  text,
  x,
  y,
  size,
  align,
  fill: themeColour(colour),
  weight,
  family: themeColour(family),
  upwards,
});

/** A cell in the colour of its value; one that was not computed is struck through. */
function cellItems(scale, value, x, y, width, height) {
  if (value !== null) return [rectItem(x, y, width, height, cssColour(scale.rgb(value)))];
  return [
    rectItem(x, y, width, height, themeColour("--raised")),
    lineItem(x + 1, y + height - 1, x + width - 1, y + 1, themeColour("--faint")),
  ];
}

/** The marks of a cell: a corner if it over-attends, a frame inside of it if it is chosen. */
function markItems(scale, value, { over, chosen }, x, y, width, height) {
  const deep = value === null ? isDark() : isDeep(scale.rgb(value));
  const colour = deep ? "#ffffff" : "#1b1e22"; // as in the style sheet
  const [left, top, right, bottom] = [x + 2.5, y + 2.5, x + width - 2.5, y + height - 2.5];
  const frame = [
    lineItem(left, top, right, top, colour),
    lineItem(right, top, right, bottom, colour),
    lineItem(right, bottom, left, bottom, colour),
    lineItem(left, bottom, left, top, colour),
  ];
  return [...(over ? [cornerItem(x + width, y, 6, colour)] : []), ...(chosen ? frame : [])];
}

/** The legend of a scale. */
function legendItems(scale, x, y, width) {
  const ticks = scale.ticks();
  return [
    textItem(scale.title, x, y),
    rampItem(x, y + 10, width, 9, palette(scale.colours)),
    ...ticks.map((text, i) =>
      textItem(text, x + (width * i) / (ticks.length - 1), y + 29, {
        size: 10,
        align: i === 0 ? "left" : i === ticks.length - 1 ? "right" : "center",
      }),
    ),
  ];
}

/** Put items on a canvas. */
function paint(context, items) {
  context.textBaseline = "middle";
  for (const item of items) PAINTERS[item.kind](context, item);
}

const PAINTERS = {
  rect(context, { x, y, width, height, fill }) {
    context.fillStyle = fill;
    context.fillRect(x, y, width, height);
  },
  line(context, { x1, y1, x2, y2, stroke }) {
    context.strokeStyle = stroke;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x1, y1);
    context.lineTo(x2, y2);
    context.stroke();
  },
  corner(context, { x, y, size, fill }) {
    context.fillStyle = fill;
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x - size, y);
    context.lineTo(x, y + size);
    context.fill();
  },
  ramp(context, { x, y, width, height, stops }) {
    const gradient = context.createLinearGradient(x, 0, x + width, 0);
    stops.forEach((stop, i) => gradient.addColorStop(i / (stops.length - 1), stop));
    context.fillStyle = gradient;
    context.fillRect(x, y, width, height);
  },
  text(context, { text, x, y, size, align, fill, weight, family, upwards }) {
    context.save();
    context.translate(x, y);
    if (upwards) context.rotate(-Math.PI / 2);
    context.font = `${weight} ${size}px ${family}`;
    context.textAlign = align;
    context.fillStyle = fill;
    context.fillText(text, 0, 0);
    context.restore();
  },
};

const EXPORT_SCALE = 2; // pixels per px: sharp in print

/** A canvas with a drawing on the page's background. */
function toCanvas({ width, height, items }) {
  const canvas = el("canvas", {
    width: Math.ceil(width * EXPORT_SCALE),
    height: Math.ceil(height * EXPORT_SCALE),
  });
  const context = canvas.getContext("2d");
  context.scale(EXPORT_SCALE, EXPORT_SCALE);
  paint(context, [rectItem(0, 0, width, height, themeColour("--bg")), ...items]);
  return canvas;
}

/** A drawing as the text of an SVG file; texts become text nodes, which the serializer escapes. */
function toSvg({ width, height, title, items }) {
  const template = byId("layer-chart"); // it knows the namespace, so that no address is written here
  const svg = document.createElementNS(template.namespaceURI, "svg");
  const size = { width: Math.ceil(width), height: Math.ceil(height) };
  for (const [name, value] of Object.entries({
    ...size,
    viewBox: `0 0 ${size.width} ${size.height}`,
    role: "img",
  }))
    svg.setAttribute(name, value);
  svgEl(svg, "title", {}, title);
  const ramps = items.filter((item) => item.kind === "ramp");
  const defs = svgEl(svg, "defs", {});
  ramps.forEach(({ stops }, number) => {
    const gradient = svgEl(defs, "linearGradient", { id: `ramp${number}` });
    stops.forEach((stop, i) =>
      svgEl(gradient, "stop", { offset: rounded(i / (stops.length - 1), 4), "stop-color": stop }),
    );
  });
  svgEl(svg, "rect", { ...size, fill: themeColour("--bg") });
  for (const item of items) {
    const fill = item.kind === "ramp" ? `url(#ramp${ramps.indexOf(item)})` : item.fill;
    SVG_WRITERS[item.kind](svg, { ...item, fill });
  }
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(svg)}\n`;
}

const rounded = (value, digits = 2) => Number(value.toFixed(digits));

const svgBox = (svg, { x, y, width, height, fill }) =>
  svgEl(svg, "rect", { x: rounded(x), y: rounded(y), width: rounded(width), height: rounded(height), fill });

const SVG_WRITERS = {
  rect: svgBox,
  ramp: svgBox,
  line: (svg, { x1, y1, x2, y2, stroke }) =>
    svgEl(svg, "line", { x1: rounded(x1), y1: rounded(y1), x2: rounded(x2), y2: rounded(y2), stroke }),
  corner: (svg, { x, y, size, fill }) =>
    svgEl(svg, "path", { d: `M${rounded(x)} ${rounded(y)}h${-size}l${size} ${size}z`, fill }),
  text(svg, { text, x, y, size, align, fill, weight, family, upwards }) {
    const at = `${rounded(x)} ${rounded(y)}`;
    svgEl(
      svg,
      "text",
      {
        transform: `translate(${at})${upwards ? " rotate(-90)" : ""}`,
        dy: "0.35em", // not dominant-baseline, which several drawing programs ignore
        "text-anchor": { left: "start", center: "middle", right: "end" }[align],
        "font-family": family,
        "font-size": size,
        "font-weight": weight,
        fill,
        "xml:space": "preserve", // a style attribute would be against the policy
      },
      text,
    );
  },
};
