/* ---------- what the saved pictures show ---------- */

function mapDrawing(map) {
  const [cellWidth, cellHeight, left, top] = [
    clamp(Math.round(520 / headCount), 14, 36),
    clamp(Math.round(540 / layerCount), 11, 20),
    56,
    40,
  ];
  const [width, height] = [headCount * cellWidth, layerCount * cellHeight];
  const items = [textItem(map.label(), left, 20, { size: 13, weight: "600", colour: "--ink" })];
  const seen = { over: false, chosen: false };
  for (const layer of range(0, layerCount)) {
    const y = top + (layerCount - 1 - layer) * cellHeight;
    if (cellHeight >= 14 || layer % 4 === 0)
      items.push(textItem(String(layer), left - 7, y + cellHeight / 2, { align: "right", size: 10 }));
    for (const head of range(0, headCount)) {
      const x = left + head * cellWidth;
      const value = map.value(layer, head);
      const cell = [x, y, cellWidth - 1, cellHeight - 1];
      const marks = map.marks(layer, head);
      items.push(...cellItems(map.scale(), value, ...cell));
      items.push(...markItems(map.scale(), value, marks, ...cell));
      for (const mark of Object.keys(seen)) seen[mark] ||= marks[mark];
    }
  }
  for (const head of range(0, headCount)) {
    if (cellWidth >= 18 || head % 4 === 0)
      items.push(
        textItem(String(head), left + (head + 0.5) * cellWidth, top + height + 10, {
          align: "center",
          size: 10,
        }),
      );
  }
  items.push(
    textItem("head", left + width / 2, top + height + 27, { align: "center" }),
    textItem("layer", 16, top + height / 2, { align: "center", upwards: true }),
    ...legendItems(map.scale(), left, top + height + 52, 260),
  );
  const said = [
    ...(seen.over ? [`Corner: more than any head of its layer in ${shortened(inert(reference.label), 20)}.`] : []),
    ...(seen.chosen ? ["Frame: a chosen head."] : []),
  ];
  said.forEach((text, i) => items.push(textItem(text, left, top + height + 106 + 18 * i)));
  return {
    width: left + Math.max(width, 400) + 24,
    height: top + height + 100 + 18 * said.length,
    title: map.label(),
    items,
  };
}

/** Cut a label to the room that there is for it. */
const shortened = (text, length) =>
  [...text].length > length ? `${[...text].slice(0, length - 1).join("")}\u2026` : text;

/** The matrices that are on the screen, in the window of tokens that is shown. */
function matricesDrawing() {
  const name = selectedName();
  const shown = shownPanels();
  const { cell } = pattern;
  const [left, top, gap, below] = [120, 56, 20, 96];
  const [width, height] = [keys().length * cell, queries().length * cell];
  const token = (position, length) => shortened(tokenText(data.tokens[position]), length);
  const colour = (position) =>
    tokenClass(position).includes("subject")
      ? "--subject"
      : position === data.query
        ? "--ink"
        : "--muted";
  const label = { size: 10, align: "right", family: "--mono" };
  const items = [
    textItem(`Head ${name}`, 10, 20, { size: 13, weight: "600", colour: "--ink" }),
    ...queries().map((position, i) =>
      textItem(token(position, 15), left - 8, top + (i + 0.5) * cell, {
        ...label,
        colour: colour(position),
      }),
    ),
  ];
  shown.forEach((panel, i) => {
    const x = left + i * (width + gap);
    items.push(
      textItem(shortened(panel.label, Math.max(4, Math.floor((width + gap) / 7))), x, top - 14, { size: 12, weight: "600", colour: "--ink" }),
      ...matrixItems(panel, name, x, top),
      ...keys().map((position, column) =>
        textItem(token(position, 13), x + (column + 0.5) * cell, top + height + 6, {
          ...label,
          colour: colour(position),
          upwards: true,
        }),
      ),
    );
  });
  const scales = [...new Set(shown.map(scaleOf))];
  scales.forEach((scale, i) =>
    items.push(...legendItems(scale, left + 360 * i, top + height + below, 260)),
  );
  return {
    width: left + Math.max(shown.length * (width + gap), 360 * scales.length, 500) + 8,
    height: top + height + below + 60,
    title: `Head ${name}: ${shown.map((panel) => panel.label).join(", ")}`,
    items,
  };
}

function saveFile(blob, name) {
  const address = URL.createObjectURL(blob);
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** Let the two buttons `id`-png and `id`-svg save a drawing under a name. */
function watchSaving(id, drawing, name) {
  byId(`${id}-png`).addEventListener("click", () =>
    toCanvas(drawing()).toBlob((blob) => saveFile(blob, `${name()}.png`)),
  );
  byId(`${id}-svg`).addEventListener("click", () =>
    saveFile(new Blob([toSvg(drawing())], { type: "image/svg+xml" }), `${name()}.svg`),
  );
}

function watchExport() {
  const fileName = (text) => `driftlens-${text.replace(/[^\w-]/g, "_")}`;
  watchSaving(
    "overview",
    () => mapDrawing(overviewMap),
    () => fileName(ui.view.id),
  );
  watchSaving("pattern", matricesDrawing, () => {
    const one = layoutNow() === "one" && panels.length > 1;
    return fileName(one ? `${selectedName()}-${pattern.single}` : selectedName());
  });
  watchSaving(
    "sweep",
    () => mapDrawing(sweepMap),
    () => "driftlens-recovered",
  );
}
