// The picture on the canvas. Only what is in view is drawn, and no more than one action for each pixel of a lane.
const pen = canvas.getContext("2d", { alpha: false });
const FONT = "12px system-ui, sans-serif";
let colours = {}, tints = [], hatch = null, pending = false;

const parts = (colour) => [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16));
const hex = (rgb) => "#" + rgb.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("");

function ink(colour) {
  const [red, green, blue] = parts(colour).map((part) => (part / 255) ** 2.2);
  const light = 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  return 1.05 / light >= light / 0.05 ? "#ffffff" : "#000000";
}

// The later a stage of its rank, the lighter.
function tintsFor(count) {
  return record.kinds.map(({ colour }) => Array.from({ length: count }, (_, position) => {
    const white = record.lightest * position / count;
    const fill = hex(parts(colour).map((part) => part + (255 - part) * white));
    return { fill, ink: ink(fill) };
  }));
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "text", "faint", "line", "lane", "wait", "focus"]) colours[name] = style.getPropertyValue(`--${name}`).trim();
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const brush = tile.getContext("2d");
  brush.strokeStyle = colours.wait;
  brush.lineWidth = 1.2;
  for (const shift of [-6, 0, 6]) {
    brush.beginPath();
    brush.moveTo(shift, 6);
    brush.lineTo(shift + 6, 0);
    brush.stroke();
  }
  hatch = pen.createPattern(tile, "repeat");
}

function measureLabels() {
  pen.font = FONT;
  const widest = Math.max(...view.panel.lanes.map((lane) => pen.measureText(laneLabel(lane)).width));
  view.left = Math.min(Math.ceil(widest) + 12, 200);
}

// Narrow windows have no room for the stages; the table below names them.
function laneLabel(lane) {
  if (view.width < 640 || lane.stages.length > 4) return lane.label;
  return `${lane.label} · stage${lane.stages.length > 1 ? "s" : ""} ${lane.stages.join(" ")}`;
}

function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; draw(); });
}

function draw() {
  const { panel, width, left, lane: height } = view;
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, width, AXIS + panel.lanes.length * height);
  pen.fillStyle = colours.lane;
  panel.lanes.forEach((_, row) => pen.fillRect(left, laneTop(row), width - left, height - GAP));
  drawAxis();
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, width - left, AXIS + panel.lanes.length * height);
  pen.clip();
  const shown = { actions: 0, bars: 0, labels: 0 };
  panel.lanes.forEach((lane, row) => drawLane(lane, row, shown));
  if (view.chosen) drawChosen();
  pen.restore();
  pen.font = FONT;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.fillStyle = colours.text;
  panel.lanes.forEach((lane, row) => pen.fillText(laneLabel(lane), 0, laneTop(row) + (height - GAP) / 2));
  Object.assign(canvas.dataset, shown, { from: view.from, to: view.to, total: panel.lanes.reduce((sum, lane) => sum + lane.count, 0) });
}

function drawAxis() {
  const length = view.to - view.from, rough = length / Math.max(2, plotWidth() / 110);
  const power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find((digit) => digit * power >= rough) * power;
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.strokeStyle = colours.line;
  pen.fillStyle = colours.faint;
  pen.lineWidth = 1;
  for (let tick = Math.ceil(view.from / step); tick * step <= view.to; tick++) {
    const x = Math.round(toX(tick * step)) + 0.5, text = tick ? formatTime(tick * step, view.panel.length) : "0";
    pen.beginPath();
    pen.moveTo(x, AXIS - 7);
    pen.lineTo(x, AXIS - 2);
    pen.stroke();
    const half = pen.measureText(text).width / 2;
    pen.textAlign = "left";
    pen.fillText(text, Math.max(view.left, Math.min(x - half, view.width - 2 * half)), 9);
  }
}

function drawLane(lane, row, shown) {
  const top = laneTop(row), height = view.lane - GAP, perSecond = plotWidth() / (view.to - view.from);
  const tinted = tints[lane.stages.length], position = Object.fromEntries(lane.stages.map((stage, place) => [stage, place]));
  let edge = -Infinity;
  pen.textAlign = "center";
  pen.font = FONT;
  for (let at = firstAfter(lane, view.from); at < lane.count; at++) {
    const start = toX(lane.start[at]), waited = lane.wait[at] * perSecond;
    if (start - waited > view.width) break;
    if (waited >= 1) {
      pen.fillStyle = hatch;
      pen.fillRect(Math.max(view.left, start - waited), top, Math.min(waited, start - view.left), height);
    }
    if (start > view.width) continue;
    shown.actions++;
    const end = toX(lane.end[at]), x = Math.round(start);
    // An action gets the pixels whose middle it covers, so that among many thin ones each kind has its share. One that covers
    // none is drawn where nothing else is.
    if (Math.round(end) === x && x < edge + 2) continue;
    const width = Math.max(1, Math.round(end) - x), { fill, ink } = tinted[lane.kind[at]][position[lane.stage[at]]];
    pen.fillStyle = fill;
    pen.fillRect(x, top, width > 4 ? width - 1 : width, height);
    edge = x + width;
    shown.bars++;
    if (width > 12) shown.labels += drawLabel(lane, at, Math.max(x, view.left), Math.min(end, view.width), top + height / 2, ink);
  }
}

// The action where its name fits, else its microbatch; in the part of the bar that is in view.
function drawLabel(lane, at, from, to, middle, colour) {
  const short = `${lane.microbatch[at]}`, full = nameOf(lane, at), room = to - from - 5;
  const text = full.length * 7.6 < room ? full : short.length * 7.6 < room ? short : "";
  if (!text) return 0;
  pen.fillStyle = colour;
  pen.fillText(text, (from + to - 1) / 2, middle + 0.5);
  return 1;
}

// An outline around the chosen action, thinner ones around those of its microbatch.
function drawChosen() {
  const { row, at } = view.chosen, microbatch = view.panel.lanes[row].microbatch[at];
  pen.strokeStyle = colours.focus;
  view.panel.lanes.forEach((lane, other) => {
    for (let index = firstAfter(lane, view.from); index < lane.count && lane.start[index] < view.to; index++) {
      if (lane.microbatch[index] !== microbatch) continue;
      const x = toX(lane.start[index]), width = toX(lane.end[index]) - x, isChosen = other === row && index === at;
      if (width < 3 && !isChosen) continue;
      pen.lineWidth = isChosen ? 3 : 1.5;
      pen.strokeRect(x + 0.75, laneTop(other) + 0.75, Math.max(2, width - 2.5), view.lane - GAP - 1.5);
    }
  });
}
