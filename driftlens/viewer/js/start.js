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
  // Paper is white.
  window.addEventListener("beforeprint", () => {
    document.documentElement.dataset.theme = "light";
    drawColours();
  });
  window.addEventListener("afterprint", () => {
    applyTheme();
    drawColours();
  });
}

function reset() {
  ui.view = startingView;
  ui.selected = firstStored;
  ui.marked = true;
  resetPattern();
  chosen.clear();
  requests.clear();
  if (data.restored) {
    byId("click-chooses").checked = false;
    sweepMap.clickChooses = false;
  }
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
  tellChosen();
}

/** Escape lets go of the innermost thing that is held: a pinned cell, then the head. */
function release(event) {
  if (event.key !== "Escape" || isTyping(event.target)) return;
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
  reserveReadout();
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
  makeRestored();
  makeTables();
  drawOverview();
  drawSelection();
  layOut();
  watchPanelKeys();
  watchExport();
  watchTheme();
  watchSize();
  watchHost();
  byId("reset").addEventListener("click", reset);
  document.addEventListener("keydown", release);
  performance.mark("driftlens-ready"); // from here on, everything answers
}

start();
