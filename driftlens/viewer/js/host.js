/* ---------- a host around the page, such as a notebook widget ---------- */

// The page tells nobody anything until the window around it has said hello; from then on it tells
// that window which head is open and which are chosen, and asks it for answers not held here.
let host = null;
const requests = new Map(); // by setKey: "computing", or what went wrong

function tell(message) {
  // "*", because neither of the two windows need have an address; only the parent receives it.
  host?.postMessage({ driftlens: true, ...message }, "*");
}

const tellOpened = () => tell({ kind: "opened", head: selectedName() ?? "" });
const tellChosen = () => tell({ kind: "chosen", heads: sortedChosen().map(nameOfNumber) });

function watchHost() {
  window.addEventListener("message", ({ source, data: message }) => {
    if (window.parent === window || source !== window.parent || message?.driftlens !== true) return;
    if (message.kind === "hello") {
      host = window.parent;
      tellOpened();
      tellChosen();
    } else if (data.restored && message.kind === "restored") {
      requests.delete(setKey(numbersOf(message.heads)));
      answersOf.set(setKey(numbersOf(message.heads)), [message.answer, message.target]);
    } else if (data.restored && message.kind === "failed") {
      requests.set(setKey(numbersOf(message.heads)), message.problem);
    } else if (message.kind === "open") {
      const place = parseHead(message.head);
      if (place && !sameHead(ui.selected, place)) selectHead(place.layer, place.head);
    } else if (data.restored && message.kind === "choose") {
      choose(numbersOf(message.heads));
    }
    const asking = document.activeElement?.classList.contains("ask");
    drawRestored();
    if (asking) byId("restore-readout").querySelector(".ask")?.focus();
  });
}

/** Have the chosen heads restored by the host. */
function askHost(numbers) {
  requests.set(setKey(numbers), "computing");
  tell({ kind: "restore", heads: numbers.map(nameOfNumber) });
  drawRestored();
  byId("restore-readout").focus(); // its button is gone
}

/** The button that asks, or how the asking goes; nothing without a host. */
function askingParts(numbers) {
  if (!host) return [];
  const state = requests.get(setKey(numbers));
  if (state === "computing") return [" Computing\u2026"];
  const button = el("button", { type: "button", class: "ask", text: "Restore them now" });
  button.addEventListener("click", () => askHost(numbers));
  return [" ", button, ...(state ? [el("span", { text: ` ${inert(state)}` })] : [])];
}
