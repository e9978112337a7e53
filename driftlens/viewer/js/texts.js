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

/** A table cell with a probability as a bar and a number. */
function gauge(value, kind) {
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
}

/** Probabilities of the true answer and the edit's target: rows of [label, answer, target]. */
function answersTable(rows) {
  const heading = (answer, role) =>
    el("th", { scope: "col" }, "P(", el("bdi", { text: inert(answer) }), `), ${role}`);
  return el(
    "table",
    { class: "answers" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("td"),
        heading(data.answer, "true answer"),
        data.targetNew ? heading(data.targetNew, "edit\u2019s target") : null,
      ),
    ),
    el(
      "tbody",
      {},
      rows.map(([label, answer, target]) =>
        el(
          "tr",
          {},
          el("th", { scope: "row", text: inert(label) }),
          gauge(answer, "answer"),
          data.targetNew ? gauge(target, "target") : null,
        ),
      ),
    ),
  );
}

function makeAnswers() {
  if (!data.probabilities.length) return;
  byId("answers").hidden = false;
  byId("answers-table").append(answersTable(data.probabilities));
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
