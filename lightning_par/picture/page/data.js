// The recorded panels, as typed arrays: one row of numbers for each rank.
const record = JSON.parse(document.getElementById("data").textContent);
const [KIND, STAGE, MICROBATCH, START, END, WAIT] = [0, 1, 2, 3, 4, 5];

for (const panel of record.panels) {
  for (const lane of panel.lanes) {
    const column = (place) => Float64Array.from(lane.spans, (span) => span[place]);
    lane.kind = column(KIND);
    lane.stage = column(STAGE);
    lane.microbatch = column(MICROBATCH);
    lane.start = column(START);
    lane.end = column(END);
    lane.wait = column(WAIT);
    lane.count = lane.spans.length;
    delete lane.spans;
  }
}

// "2F0": the forward of microbatch 0 on stage 2.
const nameOf = (lane, at) => `${lane.stage[at]}${record.kinds[lane.kind[at]].kind}${lane.microbatch[at]}`;

function formatTime(time, length = time) {
  if (!record.hasSeconds) return `${Number(time.toPrecision(5))}`;
  const [factor, unit] = length >= 1 ? [1, "s"] : length >= 1e-3 ? [1e-3, "ms"] : [1e-6, "µs"];
  return `${Number((time / factor).toPrecision(4))} ${unit}`;
}

const formatShare = (share) => `${(100 * share).toFixed(1)} %`;

// The first action of a lane that ends after a time.
function firstAfter(lane, time) {
  let low = 0, high = lane.count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lane.end[middle] > time) high = middle; else low = middle + 1;
  }
  return low;
}
