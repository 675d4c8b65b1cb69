"use strict";
// A click on a heading sorts its table: numbers by their unrounded value, texts in natural order, missing values last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const original = [...body.rows];
  headings.forEach((heading, index) => {
    heading.querySelector("button").addEventListener("click", () => {
      const first = heading.dataset.first;
      const second = first === "ascending" ? "descending" : "ascending";
      const order = { none: first, [first]: second, [second]: "none" }[heading.getAttribute("aria-sort")];
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", order);
      body.append(...(order === "none" ? original : sorted(original, index, order === "ascending" ? 1 : -1)));
    });
  });
}

function sorted(rows, index, sign) {
  const keyed = rows.map((row) => ({ row, cell: row.cells[index] }));
  return keyed
    .sort((a, b) => {
      const missing = ("none" in a.cell.dataset) - ("none" in b.cell.dataset);
      if (missing || "none" in a.cell.dataset) return missing;
      if ("value" in a.cell.dataset) return sign * (a.cell.dataset.value - b.cell.dataset.value);
      return sign * a.cell.textContent.localeCompare(b.cell.textContent, "en", { numeric: true });
    })
    .map(({ row }) => row);
}

// Unfold all tables for printing.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details:not([open])")) {
    folded.open = true;
    folded.dataset.printed = "";
  }
});
addEventListener("afterprint", () => {
  for (const folded of document.querySelectorAll("details[data-printed]")) {
    folded.open = false;
    delete folded.dataset.printed;
  }
});
