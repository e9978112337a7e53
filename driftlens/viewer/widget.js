// The page in a frame of its own, between which and Python messages go back and forth.
function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.srcdoc = model.get("document");
  frame.sandbox = "allow-scripts allow-downloads";
  frame.title = "DriftLens";
  frame.style = "width: 100%; height: 860px; border: 1px solid #8884";
  const toPage = (message) => frame.contentWindow?.postMessage({ ...message, driftlens: true }, "*");
  // All of them each time: a page that is shown later, or again, has heard none.
  const tellAnswers = () =>
    model.get("answers").forEach((answer) => toPage({ ...answer, kind: "restored" }));

  const hear = ({ source, data: message }) => {
    if (source !== frame.contentWindow || message?.driftlens !== true) return;
    if (message.kind === "opened") model.set("opened", message.head);
    else if (message.kind === "chosen") model.set("selected", message.heads);
    else if (message.kind === "restore") model.send({ kind: "restore", heads: message.heads });
    model.save_changes();
  };
  window.addEventListener("message", hear);
  frame.addEventListener("load", () => {
    // Before the page says what it has opened and chosen by itself.
    const [opened, chosen] = [model.get("opened"), model.get("selected")];
    toPage({ kind: "hello" });
    tellAnswers();
    if (opened) toPage({ kind: "open", head: opened });
    if (chosen.length) toPage({ kind: "choose", heads: chosen });
  });
  model.on("msg:custom", toPage);
  model.on("change:answers", tellAnswers);
  el.append(frame);
  return () => {
    window.removeEventListener("message", hear);
    model.off("msg:custom", toPage);
    model.off("change:answers", tellAnswers);
  };
}

export default { render };
