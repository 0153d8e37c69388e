// The ranks of a layout on a canvas; each cell of the data is the left and the top of a square whose sides are 1.
const mesh = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("chart"), pen = canvas.getContext("2d", { alpha: false });
const tip = document.getElementById("tip");
const element = (tag, text, parent) => parent.appendChild(Object.assign(document.createElement(tag), { textContent: text }));
const DASHES = { tp: [], dp: [5, 3], pp: [2, 2] };
const view = { width: 0, cell: 0, chosen: null };
let theme = {}, pending = false;

const coordinate = (rank, { stride, size }) => Math.floor(rank / stride) % size;
const holdingOf = (rank) => mesh.holdings[coordinate(rank, mesh.axes.pp)];

// The ranks that differ from one along an axis alone, itself among them.
function groupOf(rank, axis) {
  const first = rank - coordinate(rank, axis) * axis.stride;
  return Array.from({ length: axis.size }, (_, place) => first + place * axis.stride);
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "text", "focus"]) theme[name] = style.getPropertyValue(`--${name}`).trim();
}

function fit() {
  const ratio = window.devicePixelRatio || 1;
  view.width = canvas.parentElement.clientWidth;
  view.cell = Math.min(64, view.width / mesh.width);
  const height = Math.ceil(view.cell * mesh.height);
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(view.width * ratio);
  canvas.height = Math.round(height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  redraw();
}

function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; draw(); });
}

function draw() {
  const { cell, width, chosen } = view, side = cell * (cell > 12 ? 0.94 : 0.9);
  pen.fillStyle = theme.paper;
  pen.fillRect(0, 0, width, canvas.height);
  pen.textBaseline = "middle";
  const points = Math.min(13, cell * 0.3), hasWords = points > 5;
  pen.font = `${points}px system-ui, sans-serif`;
  if (hasWords) {
    pen.textAlign = "left";
    pen.fillStyle = theme.text;
    for (const [label, left, middle] of mesh.labels) pen.fillText(label, cell * left, cell * middle);
  }
  pen.textAlign = "center";
  mesh.cells.forEach(([left, top], rank) => {
    const { colour, ink } = holdingOf(rank);
    pen.fillStyle = colour;
    pen.fillRect(cell * left, cell * top, side, side);
    if (!hasWords) return;
    pen.fillStyle = ink;
    const isLarge = cell > 44, x = cell * left + side / 2, y = cell * top + side / 2;
    pen.fillText(rank, x, isLarge ? y - 8 : y);
    if (isLarge) pen.fillText(["pp", "dp", "tp"].map((name) => coordinate(rank, mesh.axes[name])).join(", "), x, y + 8);
  });
  if (chosen !== null) {
    pen.strokeStyle = theme.focus;
    for (const [name, axis] of Object.entries(mesh.axes)) {
      pen.setLineDash(DASHES[name]);
      pen.lineWidth = name === "tp" ? 3 : 2;
      for (const rank of groupOf(chosen, axis)) outline(rank, side);
    }
    pen.setLineDash([]);
  }
  Object.assign(canvas.dataset, { ranks: mesh.cells.length, cell, words: hasWords });
}

function outline(rank, side) {
  const [left, top] = mesh.cells[rank];
  pen.strokeRect(view.cell * left + 1, view.cell * top + 1, side - 2, side - 2);
}

function rankAt(x, y) {
  const rank = mesh.cells.findIndex(([left, top]) => x >= view.cell * left && x < view.cell * (left + 1) && y >= view.cell * top && y < view.cell * (top + 1));
  return rank < 0 ? null : rank;
}

// Choose a rank, or none; the tip stands beside it.
function choose(rank) {
  if (rank === view.chosen) return;
  view.chosen = rank;
  tip.hidden = rank === null;
  canvas.dataset.chosen = rank ?? "";
  if (rank !== null) {
    fillTip(rank);
    const [left, top] = mesh.cells[rank].map((place) => place * view.cell), beside = left + view.cell + 6;
    const isRight = beside + tip.offsetWidth > view.width;
    tip.style.left = `${Math.max(0, isRight ? left - 6 - tip.offsetWidth : beside)}px`;
    tip.style.top = `${top + view.cell + 6}px`;
  }
  redraw();
}

function fillTip(rank) {
  tip.replaceChildren();
  element("b", `rank ${rank}`, tip);
  const { stages, blocks, facts } = holdingOf(rank), at = (name) => coordinate(rank, mesh.axes[name]);
  const node = mesh.devicesPerNode ? { node: `${Math.floor(rank / mesh.devicesPerNode)}, device ${rank % mesh.devicesPerNode}` } : {};
  const all = { coordinate: `pp ${at("pp")}, dp ${at("dp")}, tp ${at("tp")}`, ...node, stages, blocks, ...facts };
  for (const [name, value] of Object.entries(all)) {
    const line = element("div", "", tip);
    element("span", name, line);
    element("span", value, line);
  }
}

// By the keys: it is brought into view and read out.
function go(rank) {
  choose(rank);
  tip.scrollIntoView({ block: "nearest" });
  document.getElementById("spoken").textContent = [...tip.children].map((child) => [...child.childNodes].map((part) => part.textContent).join(" ")).join(", ");
}

// The nearest rank of the next line above or below; the same where there is none.
function beyond(rank, direction) {
  const [x, y] = mesh.cells[rank];
  let best = rank, least = Infinity;
  mesh.cells.forEach(([left, top], other) => {
    const lines = direction * (top - y), far = 1000 * lines + Math.abs(left - x);
    if (lines > 0 && far < least) [best, least] = [other, far];
  });
  return best;
}

canvas.addEventListener("pointermove", (event) => choose(rankAt(event.offsetX, event.offsetY)));
canvas.addEventListener("pointerleave", () => choose(null));
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { chosen } = view, last = mesh.cells.length - 1;
  const actions = {
    ArrowLeft: () => go(chosen === null ? last : Math.max(0, chosen - 1)), ArrowRight: () => go(chosen === null ? 0 : Math.min(last, chosen + 1)),
    ArrowUp: () => go(beyond(chosen ?? 0, -1)), ArrowDown: () => go(beyond(chosen ?? 0, 1)), Escape: () => choose(null),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});

function fillPage() {
  document.getElementById("title").textContent = mesh.title;
  document.getElementById("summary").textContent = mesh.summary;
  const meanings = document.getElementById("meanings");
  for (const [name, words] of Object.entries(mesh.links)) {
    element("dt", name, meanings);
    element("dd", words, meanings);
  }
  const table = document.getElementById("holdings");
  const head = element("tr", "", element("thead", "", table)), body = element("tbody", "", table);
  for (const name of ["pp", "stages", "blocks", ...Object.keys(mesh.holdings[0].facts)]) element("th", name, head).scope = "col";
  head.children[1].className = head.children[2].className = "left";
  mesh.holdings.forEach(({ stages, blocks, facts, colour, ink }, pp) => {
    const line = element("tr", "", body), key = element("th", pp, line);
    Object.assign(key.style, { background: colour, color: ink, textAlign: "center", padding: "3px 9px" });
    for (const words of [stages, blocks]) element("td", words, line).className = "left";
    for (const size of Object.values(facts)) element("td", size, line);
  });
}

window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); redraw(); });
window.addEventListener("resize", fit);
readTheme();
fillPage();
fit();
