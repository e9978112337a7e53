/* ---------- several heads restored at once ---------- */

const chosen = new Set(); // numbers of heads: layer * headCount + head
const answersOf = new Map(); // [P(answer), P(target)] by setKey, as far as the page holds them

const headNumber = (layer, head) => layer * headCount + head;
const nameOfNumber = (number) => headName(Math.floor(number / headCount), number % headCount);
const isChosen = (layer, head) => chosen.has(headNumber(layer, head));
const setKey = (numbers) => [...numbers].sort((a, b) => a - b).join();
const headsOfLayers = (start, end) => range(start * headCount, end * headCount);

const sortedChosen = () => [...chosen].sort((a, b) => a - b);

function numbersOf(names) {
  return names.map((name) => {
    const { layer, head } = parseHead(name);
    return headNumber(layer, head);
  });
}

/** The single head that recovers most, then the nested sets, then all heads. */
let bestSets = []; // {k, numbers, pair}

function makeRestored() {
  if (!data.restored) return;
  const { edited, everything, heads, layers, windows, best, asked } = data.restored;
  byId("restore").hidden = false;
  byId("click-chooses-label").hidden = false;
  answersOf.set("", edited);
  const know = (numbers, pair) => {
    if (pair.some((value) => value !== null)) answersOf.set(setKey(numbers), pair);
  };
  know(headsOfLayers(0, layerCount), everything);
  heads.forEach((row, layer) => row.forEach((pair, head) => know([headNumber(layer, head)], pair)));
  layers.forEach((pair, layer) => know(headsOfLayers(layer, layer + 1), pair));
  for (const [start, end, ...pair] of windows) know(headsOfLayers(start, end), pair);
  const sets = best.map(([names, ...pair]) => ({ k: names.length, numbers: numbersOf(names), pair }));
  for (const { numbers, pair } of sets) know(numbers, pair);
  for (const [names, ...pair] of asked) know(numbersOf(names), pair);

  const first = sets.length && sets[0].k > 1 ? [sets[0].numbers[0]] : [];
  bestSets = [
    ...first.map((number) => ({ k: 1, numbers: [number], pair: answersOf.get(String(number)) })),
    ...sets,
    { k: layerCount * headCount, numbers: headsOfLayers(0, layerCount), pair: everything },
  ].filter(({ pair }) => pair);
  makeRestoreChoice(asked);
}

/** Buttons of the sets whose answers are known, and what they say. */
function makeRestoreChoice(asked) {
  byId("restore-note").textContent =
    "Choose heads in the map above (Space, Shift-click, or a click once that is switched on), a layer or window in the table of numbers, or one of these sets. The answers are shown where exactly that set was restored.";
  const setButtonOf = (text, numbers, label) => {
    const button = el("button", {
      type: "button",
      text,
      title: label,
      "aria-label": label,
      "data-set": setKey(numbers),
    });
    button.addEventListener("click", () => choose(setKey(numbers) === setKey(chosen) ? [] : numbers));
    return button;
  };
  byId("best-sets").replaceChildren(
    el("span", { class: "label", text: "Recover most alone:" }),
    ...bestSets.map(({ k, numbers }) => {
      const all = k === layerCount * headCount;
      return setButtonOf(all ? "all" : String(k), numbers, all ? `All ${k} heads` : `Best ${k}`);
    }),
  );
  byId("asked-sets").hidden = !asked.length;
  byId("asked-sets").replaceChildren(
    el("span", { class: "label", text: "Asked for:" }),
    ...asked.map(([names]) => setButtonOf(inShort(names), numbersOf(names), names.join(", "))),
  );
  byId("click-chooses").addEventListener("change", () => {
    sweepMap.clickChooses = byId("click-chooses").checked;
  });
  const key = (kind, text) =>
    el("span", { class: "item" }, el("span", { class: `sample line ${kind}` }), text);
  byId("best-key").replaceChildren(
    key("answer", `P(${inert(data.answer)})`),
    ...(data.targetNew ? [key("target", `P(${inert(data.targetNew)})`)] : []),
    key("before", "original model"),
  );
}

const inShort = (names) =>
  names.length > 4 ? `${names.slice(0, 3).join(" + ")} + ${names.length - 3} more` : names.join(" + ");

function toggleChosen(layer, head) {
  const number = headNumber(layer, head);
  choose(chosen.has(number) ? [...chosen].filter((other) => other !== number) : [...chosen, number]);
}

/** Restore exactly these heads. */
function choose(numbers) {
  chosen.clear();
  for (const number of numbers) chosen.add(number);
  sweepMap.paint();
  drawRestored();
  tellChosen();
}

const MAX_CHIPS = 24; // chosen heads that are listed one by one

function drawRestored() {
  if (!data.restored) return;
  const key = setKey(chosen);
  for (const button of byId("restore").querySelectorAll("[data-set]")) {
    button.setAttribute("aria-pressed", String(button.dataset.set === key));
  }
  const numbers = sortedChosen();
  const chips = numbers.slice(0, MAX_CHIPS).map((number) => {
    const name = nameOfNumber(number);
    const button = el("button", { type: "button", "aria-label": `Leave ${name} out` }, `${name} \u00d7`);
    button.addEventListener("click", () => {
      choose(numbers.filter((other) => other !== number));
      (byId("chosen-heads").querySelector("button") ?? byId("best-sets").querySelector("button"))?.focus();
    });
    return button;
  });
  const more = numbers.length - chips.length;
  const clear = el("button", { type: "button", class: "clear", text: "Choose none" });
  clear.addEventListener("click", () => {
    choose([]);
    byId("best-sets").querySelector("button")?.focus();
  });
  byId("chosen-heads").replaceChildren(
    el("span", { class: "label", text: numbers.length ? `Chosen (${numbers.length}):` : "" }),
    ...chips,
    ...(more > 0 ? [el("span", { class: "label", text: `and ${more} more` })] : []),
    ...(numbers.length ? [clear] : []),
  );
  drawRestoredAnswers(numbers, answersOf.get(key));
  drawBestChart();
}

function drawRestoredAnswers(numbers, pair) {
  const { original, edited } = data.restored;
  const label = numbers.length === 1 ? nameOfNumber(numbers[0]) : `${numbers.length} heads`;
  byId("restore-table").replaceChildren(
    answersTable([
      ["Edited, nothing restored", ...edited],
      ...(numbers.length ? [[`Edited, ${label} restored`, ...(pair ?? [null, null])]] : []),
      ["Original", ...original],
    ]),
  );
  const box = byId("restore-readout");
  if (!numbers.length) {
    box.replaceChildren("No head is chosen.");
  } else if (pair) {
    const [answer, target] = pair;
    const read = (text, value) => [
      "P(",
      el("bdi", { text: inert(text) }),
      ") ",
      el("b", { text: format(value) }),
    ];
    box.replaceChildren(
      `${label} restored: `,
      ...read(data.answer, answer),
      ...(data.targetNew ? [", ", ...read(data.targetNew, target)] : []),
    );
  } else {
    const names = numbers.map(nameOfNumber).map(pythonText).join(", ");
    box.replaceChildren(
      `${label} restored: not computed.`,
      ...askingParts(numbers),
      el("span", { class: "how", text: "This call computes it:" }),
      el("code", {
        text: `dl.patch_attention(model, edit, prompt, answer=${pythonText(data.answer)}, heads=[${names}])`,
      }),
      el("span", { class: "how", text: "With this argument, the page will hold it:" }),
      el("code", { text: `dl.compare(..., head_sets=[[${names}]])` }),
    );
  }
}

/** A text as Python writes it, with everything that cannot be seen as an escape. */
const pythonText = (text) =>
  JSON.stringify(text).replace(HIDDEN, (character) => {
    const code = character.codePointAt(0).toString(16);
    return code.length > 4 ? `\\U${code.padStart(8, "0")}` : `\\u${code.padStart(4, "0")}`;
  });

/** Both probabilities against the number of restored heads, on a logarithmic axis. */
function drawBestChart() {
  const svg = byId("best-chart");
  byId("best-figure").hidden = bestSets.length < 3;
  if (bestSets.length < 3) return;
  const points = [{ k: 0, numbers: [], pair: data.restored.edited }, ...bestSets];
  const width = Math.max(240, svg.parentElement.clientWidth);
  const box = { left: 40, right: width - 14, top: 10, bottom: 152 };
  const last = Math.log1p(points.at(-1).k);
  const x = (k) => box.left + 8 + ((box.right - box.left - 8) * Math.log1p(k)) / last;
  const y = (value) => box.bottom - (box.bottom - box.top) * clamp(value, 0, 1);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} 190`);
  svg.setAttribute("aria-label", "Lines: probabilities by number of restored heads; choose a set for its numbers.");
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    const kind = tick === 0 ? "axis" : "level";
    svgEl(svg, "line", { class: kind, x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) });
    svgEl(svg, "text", { x: box.left - 7, y: y(tick) + 4, "text-anchor": "end" }, String(tick));
  }
  let free = -Infinity; // where the next label may begin
  for (const { k } of points) {
    const half = 4 * String(k).length;
    if (x(k) - half < free) continue;
    free = x(k) + half + 3;
    svgEl(svg, "text", { x: x(k), y: box.bottom + 15, "text-anchor": "middle" }, String(k));
  }
  svgEl(
    svg,
    "text",
    { x: (box.left + box.right) / 2, y: box.bottom + 32, "text-anchor": "middle" },
    "k, heads restored (logarithmic)",
  );
  ["answer", "target"].forEach((kind, i) => {
    const before = data.restored.original[i];
    const known = points.filter(({ pair }) => pair[i] !== null);
    if (before !== null && kind === "answer")
      svgEl(svg, "line", { class: "before", x1: box.left, x2: box.right, y1: y(before), y2: y(before) });
    svgEl(svg, "polyline", {
      class: `trace ${kind}`,
      points: known.map(({ k, pair }) => `${x(k)},${y(pair[i])}`).join(" "),
    });
    for (const { k, numbers, pair } of known) {
      const on = numbers.length > 0 && setKey(numbers) === setKey(chosen);
      const [px, py, size] = [x(k), y(pair[i]), on ? 5.5 : 3.5];
      // Round and square, so that colour alone does not tell them apart.
      if (kind === "answer") svgEl(svg, "circle", { class: "dot answer", cx: px, cy: py, r: size });
      else
        svgEl(svg, "rect", {
          class: "dot target",
          x: px - size,
          y: py - size,
          width: 2 * size,
          height: 2 * size,
        });
    }
  });
  for (const { k, numbers } of points) {
    const hit = svgEl(svg, "rect", {
      class: "hit choose",
      x: x(k) - 7,
      width: 14,
      y: box.top,
      height: box.bottom - box.top,
    });
    hit.addEventListener("click", () => choose(numbers));
  }
}
