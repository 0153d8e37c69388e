// Mouse, touch, keys, the choice of a panel, and the table.
const tip = document.getElementById("tip"), choices = { step: document.getElementById("step"), replica: document.getElementById("replica") };
const element = (tag, text, parent) => parent.appendChild(Object.assign(document.createElement(tag), { textContent: text }));
let drag = null;

function actionAt(x, y) {
  const row = laneAt(y), lane = view.panel.lanes[row];
  if (!lane || x < view.left) return null;
  const time = toTime(x), at = firstAfter(lane, time);
  return at < lane.count && time >= lane.start[at] - lane.wait[at] ? { row, at } : null;
}

// Choose an action, or none; the tip stands beside x, y.
function choose(chosen, x, y) {
  view.chosen = chosen;
  tip.hidden = !chosen;
  canvas.dataset.chosen = chosen ? nameOf(view.panel.lanes[chosen.row], chosen.at) : "";
  if (chosen) {
    fillTip(view.panel.lanes[chosen.row], chosen.at);
    const right = x + 16 + tip.offsetWidth > view.width;
    tip.style.left = `${Math.max(0, right ? Math.min(x - 16, view.width) - tip.offsetWidth : x + 16)}px`;
    tip.style.top = `${y + 18}px`;
  }
  redraw();
}

function fillTip(lane, at) {
  tip.replaceChildren();
  const kind = record.kinds[lane.kind[at]];
  element("b", `${nameOf(lane, at)}: ${kind.name} on ${lane.label}`, tip);
  const facts = {
    stage: lane.stage[at], microbatch: lane.microbatch[at], start: formatTime(lane.start[at]),
    duration: formatTime(lane.end[at] - lane.start[at]), "waited before": formatTime(lane.wait[at]),
  };
  for (const [name, value] of Object.entries(facts)) {
    const line = element("div", "", tip);
    element("span", name, line);
    element("span", value, line);
  }
}

// To another action by the keys: it is brought into view and read out.
function step(rows, actions) {
  const lanes = view.panel.lanes, { row, at } = view.chosen ?? { row: 0, at: -1 };
  const next = Math.min(Math.max(0, row + rows), lanes.length - 1), lane = lanes[next];
  if (!lane.count) return;
  const near = rows && view.chosen ? firstAfter(lane, lanes[row].start[at]) : at + actions;
  const index = Math.min(Math.max(0, near), lane.count - 1), middle = (lane.start[index] + lane.end[index]) / 2;
  if (middle < view.from || middle > view.to) pan(middle - (view.from + view.to) / 2);
  choose({ row: next, at: index }, Math.min(Math.max(view.left, toX(lane.end[index])), view.width), laneTop(next) + view.lane / 2);
  document.getElementById("spoken").textContent = [...tip.children].map((child) => [...child.childNodes].map((part) => part.textContent).join(" ")).join(", ");
}

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 16 : 1;
  if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    pan((event.deltaX || event.deltaY) * lines / plotWidth() * (view.to - view.from));
  } else {
    zoom(Math.exp(-event.deltaY * lines * 0.002), event.offsetX);
  }
}, { passive: false });
canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  drag = { x: event.offsetX, from: view.from, to: view.to };
  canvas.classList.add("dragged");
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag) return choose(actionAt(event.offsetX, event.offsetY), event.offsetX, event.offsetY);
  const time = (drag.x - event.offsetX) / plotWidth() * (drag.to - drag.from);
  choose(null);
  show(drag.from + time, drag.to + time);
});
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, () => { drag = null; canvas.classList.remove("dragged"); });
}
canvas.addEventListener("pointerleave", () => choose(null));
canvas.addEventListener("dblclick", (event) => zoom(3, event.offsetX));
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const far = (view.to - view.from) / 5;
  const actions = {
    ArrowLeft: () => event.shiftKey ? pan(-far) : step(0, -1), ArrowRight: () => event.shiftKey ? pan(far) : step(0, 1),
    ArrowUp: () => step(-1, 0), ArrowDown: () => step(1, 0), "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5),
    Home: showWhole, Escape: () => choose(null),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});
document.getElementById("zoom-in").addEventListener("click", () => zoom(1.5));
document.getElementById("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
document.getElementById("whole").addEventListener("click", showWhole);

function fillTable() {
  const { lanes, bubbles, length } = view.panel, table = document.getElementById("bubbles");
  table.replaceChildren();
  const head = element("tr", "", element("thead", "", table)), body = element("tbody", "", table);
  for (const name of ["rank", "stages", "works", "waits", ...bubbles.map((bubble) => bubble.name)]) element("th", name, head).scope = "col";
  head.children[1].className = "left";
  lanes.forEach((lane, row) => {
    const line = element("tr", "", body), sum = (values) => values.reduce((total, value) => total + value, 0);
    element("th", lane.label, line).scope = "row";
    element("td", lane.stages.join(", "), line).className = "left";
    element("td", formatTime(sum(lane.end) - sum(lane.start), length), line);
    element("td", formatTime(sum(lane.wait), length), line);
    for (const { values } of bubbles) {
      const cell = element("td", "", line), share = element("span", "", cell);
      share.className = "share";
      element("i", "", share).style.width = `${Math.min(100, 100 * values[row])}%`;
      cell.append(formatShare(values[row]));
    }
  });
  const total = element("tr", "", element("tfoot", "", table));
  element("th", "all", total).scope = "row";
  for (let empty = 0; empty < 3; empty++) element("td", "", total);
  for (const { values } of bubbles) element("td", formatShare(values.reduce((sum, value) => sum + value, 0) / values.length), total);
  const meanings = document.getElementById("meanings");
  meanings.replaceChildren();
  for (const { name, meaning } of bubbles) {
    element("dt", name, meanings);
    element("dd", meaning, meanings);
  }
}

function fillLegend() {
  const legend = document.getElementById("legend"), present = new Set(view.panel.lanes.flatMap((lane) => [...lane.kind]));
  legend.replaceChildren();
  record.kinds.forEach(({ kind, name, colour }, place) => {
    if (present.has(place)) legendLine(legend, `${kind} ${name}`).style.background = colour;
  });
  legendLine(legend, "wait").className = "wait";
  if (view.panel.lanes.some((lane) => lane.stages.length > 1)) element("li", "lighter: a later stage of the rank", legend);
}

function legendLine(legend, text) {
  const line = element("li", "", legend), mark = element("i", "", line);
  element("span", text, line);
  return mark;
}

function showPanel() {
  view.panel = record.panels.find((panel) => panel.step === choices.step.value && panel.replica === choices.replica.value);
  const counts = Math.max(...view.panel.lanes.map((lane) => lane.stages.length));
  tints = Array.from({ length: counts + 1 }, (_, count) => tintsFor(count));
  const { step: batch, replica, length } = view.panel;
  document.getElementById("summary").textContent = [batch, replica, formatTime(length)].filter(Boolean).join("  ·  ");
  choose(null);
  fillLegend();
  fillTable();
  view.from = 0;
  view.to = view.panel.length;
  fit();
}

document.getElementById("title").textContent = record.title;
for (const name of ["step", "replica"]) {
  const values = [...new Set(record.panels.map((panel) => panel[name]))];
  values.forEach((value) => element("option", value, choices[name]));
  document.getElementById(`${name}-choice`).hidden = values.length < 2;
  choices[name].addEventListener("change", showPanel);
}
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); redraw(); });
window.addEventListener("resize", fit);
readTheme();
showPanel();
draw();
