"use strict";
// Sorts a table by the column whose head is clicked: numbers before texts, ends turned by
// a second click.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const text = row.cells[column].textContent.trim();
      const number = parseFloat(text.replace(/,(?=\d{3})/g, ""));
      return { row, text, number };
    });
    keyed.sort((a, b) => {
      const known = [Number.isNaN(a.number), Number.isNaN(b.number)];
      if (known[0] !== known[1]) return known[0] - known[1];
      const order = known[0] ? a.text.localeCompare(b.text) : a.number - b.number;
      return up ? order : -order;
    });
    table.tBodies[0].append(...keyed.map((each) => each.row));
  }));
}

// Shows what the lines of a chart are at the point that is nearest to the pointer.
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
for (const svg of document.querySelectorAll("svg.chart")) {
  const lines = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name,
    values: JSON.parse(line.dataset.points),
    places: line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
  }));
  const rule = svg.appendChild(document.createElementNS(svg.namespaceURI, "line"));
  rule.setAttribute("class", "rule");
  const hide = () => {
    tip.style.display = "none";
    rule.style.display = "none";
  };
  hide();
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(svg.getScreenCTM().inverse()).x;
    let best = null;
    for (const { places, values } of lines) {
      places.forEach(([x], i) => {
        if (best === null || Math.abs(x - at) < Math.abs(best.x - at)) {
          best = { x, value: values[i][0] };
        }
      });
    }
    const told = [`${svg.dataset.x} ${best.value}`];
    for (const { name, values } of lines) {
      const here = values.find(([x]) => x === best.value);
      if (here) told.push(`${name}: ${here[1]}`);
    }
    tip.textContent = told.join("\n");
    rule.setAttribute("x1", best.x);
    rule.setAttribute("x2", best.x);
    rule.setAttribute("y1", 0);
    rule.setAttribute("y2", svg.viewBox.baseVal.height);
    rule.style.display = "";
    tip.style.display = "block";
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
}
