// The page of several runs: a metric against l or another metric, curves of training, and the table.

const runs = data.runs.map((run) => ({ ...run, on: true }));
const metricNames = new Map([["l", "pool multiplier l"], ...data.metrics]);
const seriesNames = [...new Set(data.runs.map((run) => run.series))];
const seriesColor = new Map(seriesNames.map((name, i) => [name, color(i, seriesNames.length)]));
const boxes = new Map();

/** Mean, least and greatest of the values by x: {points, band}. */
function spread(pairsOfXY) {
  const byX = new Map();
  for (const [x, y] of pairsOfXY) byX.set(x, [...(byX.get(x) || []), y]);
  const xs = [...byX.keys()].sort((a, b) => a - b);
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  return {
    points: xs.map((x) => [x, mean(byX.get(x))]),
    band: xs.map((x) => [x, Math.min(...byX.get(x)), Math.max(...byX.get(x))]),
  };
}

const measured = (value) => value !== null && value !== undefined;
const shownOf = (series) => runs.filter((run) => run.on && run.series === series);

/** A line a series against l, level lines for runs without a pool; against another metric a dot a run. */
function mainLines(x, y) {
  return seriesNames.flatMap((name) => {
    const own = shownOf(name).filter((run) => measured(run.values[y]));
    const line = { name, color: seriesColor.get(name), dots: true };
    if (x !== "l") return [{ ...line, loose: true, points: own.map((run) => [run.values[x], run.values[y]]) }];
    const pooled = own.filter((run) => run.l !== null), level = own.filter((run) => run.l === null);
    const mean = spread(level.map((run) => [0, run.values[y]]));
    return [
      ...(pooled.length ? [{ ...line, ...spread(pooled.map((run) => [run.l, run.values[y]])) }] : []),
      ...(level.length ? [{ ...line, level: mean.points[0][1], levelBand: mean.band[0].slice(1), dash: "6 4" }] : []),
    ];
  });
}

function trainingLines(metric) {
  return seriesNames.flatMap((name) => {
    const byL = Map.groupBy(shownOf(name).filter((run) => run.curves.tokens), (run) => run.l);
    return [...byL].map(([l, own]) => ({
      name: l === null ? name : `${name}, l=${l}`,
      ...spread(own.flatMap((run) => run.curves.tokens.map((x, i) => [x, run.curves[metric][i]]).filter(([, value]) => measured(value)))),
    }));
  });
}

function frequencyLines() {
  const centre = (i) => Math.sqrt(data.edges[i] * data.edges[i + 1]) || data.edges[i + 1] / 3;
  return seriesNames.flatMap((name) => {
    const byL = Map.groupBy(shownOf(name).filter((run) => run.histogram.length), (run) => run.l);
    return [...byL].map(([l, own]) => ({
      name: l === null ? name : `${name}, l=${l}`,
      ...spread(own.flatMap((run) => run.histogram.map((count, i) => [centre(i), count]))),
    }));
  });
}

/** Each of its own colour, as many as there are. */
function coloured(lines) {
  return lines.map((line, i) => ({ ...line, color: color(i, lines.length) }));
}

function draw() {
  const [x, y] = [byId("x").value, byId("y").value];
  history.replaceState(null, "", `#y=${encodeURIComponent(y)}&x=${encodeURIComponent(x)}`);
  const axes = { xName: metricNames.get(x), yName: metricNames.get(y), xLog: x === "l" ? 2 : 0, label: `${metricNames.get(y)} against ${metricNames.get(x)}` };
  byId("main-chart").replaceChildren(figure("", lineChart(mainLines(x, y), axes)));
  for (const [name, box] of boxes) {
    const own = runs.filter((run) => run.series === name), on = own.filter((run) => run.on).length;
    box.checked = on > 0;
    box.indeterminate = on > 0 && on < own.length;
  }
  const charts = [];
  for (const [metric, title, log] of [["fvu", "FVU of the batch", 10], ["l0", "L0 of the batch", 0]]) {
    const lines = coloured(trainingLines(metric));
    if (lines.length) charts.push(figure(`${title} in training`, lineChart(lines, { xName: "tokens", yName: title, yLog: log, label: title }), lines));
  }
  const lines = coloured(frequencyLines());
  if (lines.length) charts.push(figure("How often features are active", lineChart(lines, { xName: "share of tokens", yName: "features", xLog: 10, label: "features by density" }), lines));
  byId("charts").replaceChildren(...charts);
}

function options(place, names, chosen) {
  place.append(...names.map(([id, name]) => el("option", { value: id }, name)));
  if (names.some(([id]) => id === chosen)) place.value = chosen;
  place.addEventListener("change", draw);
}

function nextMetric(by) {
  const list = byId("y");
  list.selectedIndex = (list.selectedIndex + by + list.length) % list.length;
  draw();
}

const wanted = new URLSearchParams(location.hash.slice(1));
byId("title").textContent = data.name;
options(byId("y"), data.metrics, wanted.get("y") || "fvu");
options(byId("x"), [["l", metricNames.get("l")], ...data.metrics], wanted.get("x") || "l");
const table = new RunsTable(byId("runs"), runs, data.metrics, draw);
for (const name of seriesNames) {
  const box = el("input", { type: "checkbox" }), swatch = el("span", { class: "swatch" });
  swatch.style.background = seriesColor.get(name);
  box.addEventListener("change", () => {
    for (const run of runs) if (run.series === name) run.on = box.checked;
    table.draw();
    draw();
  });
  boxes.set(name, box);
  byId("series").append(el("label", {}, box, " ", swatch, name));
}
if (Object.keys(data.about).length) byId("about").append(el("h2", {}, "Settings of all"), pairs(Object.entries(data.about)));
const KEYS = [
  ["j, k", "next and previous metric"],
  ["a", "all runs on"],
];
listen(KEYS, {
  j: () => nextMetric(1),
  k: () => nextMetric(-1),
  a: () => {
    for (const run of runs) run.on = true;
    table.draw();
    draw();
  },
});
draw();
