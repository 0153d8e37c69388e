// What part of the time is shown, and where on the canvas.
const canvas = document.getElementById("chart");
const AXIS = 26, GAP = 5;  // pixels: the axis above the lanes, and between two lanes
const view = { panel: record.panels[0], from: 0, to: 1, width: 0, left: 0, lane: 30, chosen: null };

const plotWidth = () => Math.max(1, view.width - view.left);
const toX = (time) => view.left + (time - view.from) / (view.to - view.from) * plotWidth();
const toTime = (x) => view.from + (x - view.left) / plotWidth() * (view.to - view.from);
const laneTop = (row) => AXIS + row * view.lane;
const laneAt = (y) => Math.floor((y - AXIS) / view.lane);

function show(from, to) {
  const length = view.panel.length, span = Math.min(length, Math.max(to - from, length * 1e-6));
  view.from = Math.min(Math.max(0, from), length - span);
  view.to = view.from + span;
  redraw();
}

const showWhole = () => show(0, view.panel.length);
const pan = (time) => show(view.from + time, view.to + time);

// The time under x stays where it is.
function zoom(factor, x = view.left + plotWidth() / 2) {
  const length = view.panel.length, fixed = toTime(x), share = (fixed - view.from) / (view.to - view.from);
  const span = Math.min(length, Math.max((view.to - view.from) / factor, length * 1e-6));
  show(fixed - share * span, fixed - share * span + span);
}

// Lanes fill the window where they can; a canvas that is longer scrolls with the page.
function fit() {
  const ratio = window.devicePixelRatio || 1, rows = view.panel.lanes.length;
  view.width = canvas.parentElement.clientWidth;
  view.lane = Math.max(18, Math.min(54, Math.floor((window.innerHeight - 240) / rows)));
  const height = AXIS + rows * view.lane;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(view.width * ratio);
  canvas.height = Math.round(height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  measureLabels();
  redraw();
}
