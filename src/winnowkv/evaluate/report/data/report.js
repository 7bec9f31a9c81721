"use strict";
const body = document.querySelector("#table tbody");
const heads = [...document.querySelectorAll("#table thead th")];
const filters = [...document.querySelectorAll(".controls select")];

// Shows the rows that match every filter, and their number.
function show() {
  let count = 0;
  for (const row of body.rows) {
    row.hidden = filters.some((one) => one.value && row.dataset[one.id.slice(3)] !== one.value);
    count += row.hidden ? 0 : 1;
  }
  document.querySelector("#shown").value = `${count} of ${body.rows.length} rows`;
}

function key(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value === undefined) return cell.textContent.trim();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

// Numbers start with the largest, texts with the first; a second click turns the order. Unknown values stay last.
function sort(column) {
  const head = heads[column];
  const first = head.classList.contains("number") ? "descending" : "ascending";
  const second = first === "descending" ? "ascending" : "descending";
  const order = head.getAttribute("aria-sort") === first ? second : first;
  for (const one of heads) one.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => [key(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
  });
  body.append(...rows.map(([, row]) => row));
}

heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));
for (const one of filters) {
  one.value = one.dataset.start ?? "";
  one.addEventListener("change", show);
}
document.querySelector("#everything").addEventListener("click", () => {
  for (const one of filters) one.value = "";
  show();
});
document.querySelector(".controls").hidden = false;
show();
