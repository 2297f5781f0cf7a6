// Shows the values of the lines nearest to the pointer; the page is readable without.
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(chart.dataset.lines);
  const [left, right, top, bottom] = chart.dataset.plot.split(",").map(Number);
  let cursor = null;
  const add = (kind, attributes, parent) => {
    const element = document.createElementNS(chart.namespaceURI, kind);
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    return parent.appendChild(element);
  };
  const clear = () => { if (cursor) cursor.remove(); cursor = null; };
  chart.addEventListener("pointerleave", clear);
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
    clear();
    if (x < left - 8 || x > right + 8) return;
    cursor = add("g", {class: "cursor"}, chart);
    let label = "";
    for (const line of lines.filter(line => line.points.length)) {
      const near = line.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      if (!label) { label = near[2] + " samples"; add("path", {d: `M${near[0]} ${top}V${bottom}`}, cursor); }
      add("circle", {cx: near[0], cy: near[1], r: 4, class: "f" + line.colour}, cursor);
      label += " · " + (lines.length > 1 ? line.name + " " : "") + near[3];
    }
    add("text", {x: left, y: bottom + 30}, cursor).textContent = label;
  });
}
