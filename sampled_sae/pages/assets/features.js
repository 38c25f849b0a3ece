// The page of one SAE: its overview, the table, the search, and what a link opens.

const columns = {
  counts: unpacked(data.columns.counts, Int32Array),
  means: unpacked(data.columns.means, Float32Array),
  maxima: unpacked(data.columns.maxima, Float32Array),
  rises: unpacked(data.columns.rises, Float32Array),
  neighbours: unpacked(data.columns.neighbours, Int32Array),
  cosines: unpacked(data.columns.cosines, Float32Array),
  keys: unpacked(data.columns.keys, Int32Array),
};
const nFeatures = columns.counts.length;
const lensKeys = unpacked(data.lens_keys, Int32Array);
const lensWidth = place.size ? lensKeys.length / place.size : 0;
const lowerWords = data.words.map((word) => word.toLowerCase());

const tableColumns = [
  { id: "feature", name: "feature", help: "its number", up: true, value: (j) => j, cell: (j) => featureLink(j) },
  { id: "density", name: "density", help: "share of tokens on which it is active", value: (j) => columns.counts[j] / data.measured.tokens, cell: (j) => percent(columns.counts[j] / data.measured.tokens) },
  { id: "mean", name: "mean", help: "mean activation where it is active", value: (j) => columns.means[j], cell: (j) => brief(columns.means[j]) },
  { id: "max", name: "max", help: "greatest activation", value: (j) => columns.maxima[j], cell: (j) => brief(columns.maxima[j]) },
  columns.rises && { id: "rise", name: "ΔFVU", help: "by how much FVU rises without it: what it carries of the loss", value: (j) => columns.rises[j], cell: (j) => brief(columns.rises[j]) },
  { id: "cosine", name: "nearest", help: "cosine to the nearest decoder row, and whose", value: (j) => (columns.neighbours[j] < 0 ? NaN : columns.cosines[j]), cell: (j) => (columns.neighbours[j] < 0 ? "–" : `${brief(columns.cosines[j])} (${columns.neighbours[j]})`) },
  columns.keys && { id: "words", name: "most active on", help: "tokens of its greatest activations; in bold where the page has the feature in full", value: (j) => (place.has(j) ? 1 : 0), cell: (j) => el("span", { class: place.has(j) ? "full" : "part-only" }, ...topWords(j, 4)) },
].filter(Boolean);

const table = new LongTable(byId("table"), tableColumns, nFeatures, (feature) => go(feature));

/** Accepts the features whose number begins with the text, or with a token that has the text in it. */
function matching(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return () => true;
  const hit = Uint8Array.from(lowerWords, (word) => word.includes(wanted));
  const found = new Uint8Array(nFeatures);
  if (columns.keys) columns.keys.forEach((word, i) => { if (word >= 0 && hit[word]) found[Math.floor(i / data.keys)] = 1; });
  const shown = [...place.keys()];
  lensKeys.forEach((word, i) => { if (hit[word]) found[shown[Math.floor(i / lensWidth)]] = 1; });
  const digits = /^\d+$/.test(wanted);
  return (feature) => found[feature] === 1 || (digits && String(feature).startsWith(wanted));
}

function search() {
  const matches = matching(byId("search").value), fullAlone = byId("full").checked;
  table.filter((feature) => matches(feature) && (!fullAlone || place.has(feature)));
  const count = table.shown.length;
  byId("count").textContent = `${number(count)} of ${number(nFeatures)} features`;
}

function go(feature) {
  location.hash = feature === undefined ? "" : `feature=${feature}`;
}

async function show() {
  const named = /^#feature=(\d+)$/.exec(location.hash);
  const feature = named && Number(named[1]) < nFeatures ? Number(named[1]) : null;
  document.body.classList.toggle("one", feature !== null);
  const view = feature === null ? overview(named) : await featureView(feature);
  // another link may have been followed meanwhile
  if (named && location.hash !== named[0]) return;
  byId("view").replaceChildren(view);
  byId("view").scrollTop = 0;
  table.select(feature);
}

function densityChart() {
  const shares = Array.from(columns.counts).filter((count) => count > 0).map((count) => Math.log10(count / data.measured.tokens));
  const low = Math.floor(Math.min(-1, Math.log10(1 / data.measured.tokens))), bins = 40;
  const counts = new Array(bins).fill(0);
  for (const share of shares) counts[Math.min(bins - 1, Math.floor(((share - low) / -low) * bins))] += 1;
  const edges = Array.from({ length: bins + 1 }, (_, i) => 10 ** (low - (low * i) / bins));
  return figure("How often features are active", barChart(counts, edges, { xName: "share of tokens (log scale)", yName: "features", xLog: 10, label: "histogram of densities" }));
}

function trainingCharts() {
  const { tokens, ...metrics } = data.curves;
  const names = { loss: "loss", fvu: "FVU of the batch", l0: "L0 of the batch", dead_share: "share of dead features" };
  return Object.entries(names).filter(([name]) => metrics[name] && metrics[name].some((value) => value !== null)).map(([name, title]) => {
    const line = { name: title, color: color(0, 1), points: tokens.map((x, i) => [x, metrics[name][i]]) };
    const log = name === "loss" || name === "fvu" ? 10 : 0;
    return figure(title, lineChart([line], { xName: "tokens", yName: title, yLog: log, label: `${title} against tokens of training` }));
  });
}

function overview(unknown) {
  const measured = data.measured, made = el("article", { "aria-label": "overview" }, el("h2", {}, "Overview"));
  if (unknown) made.append(el("p", { role: "alert" }, `There is no feature ${unknown[1]}: the SAE has ${number(nFeatures)}, from 0.`));
  made.append(el("p", {}, data.line));
  const here = [["tokens looked at", measured.tokens], ["features", nFeatures], ["features in full", place.size], ["L0", measured.l0], ["FVU", measured.fvu], ["never active on them", percent(measured.silent)]];
  made.append(el("div", { class: "beside" }, el("section", {}, el("h3", {}, "On these tokens"), pairs(here)), ...(Object.keys(data.corpus).length ? [el("section", {}, el("h3", {}, "Activations"), pairs(Object.entries(data.corpus)))] : [])));
  made.append(densityChart());
  if (Object.keys(data.evaluation).length) made.append(el("section", {}, el("h3", {}, "On held-out activations"), pairs(Object.entries(data.evaluation))));
  if (data.curves.tokens) made.append(el("h3", {}, "Training"), el("div", { class: "charts" }, ...trainingCharts()));
  for (const [name, values] of Object.entries(data.settings)) {
    if (Object.keys(values).length) made.append(el("details", {}, el("summary", {}, `Settings: ${name}`), pairs(Object.entries(values))));
  }
  return made;
}

function step(by) {
  if (table.shown.length) go(table.beside(by));
}

byId("title").textContent = data.name;
byId("search").addEventListener("input", search);
byId("full").addEventListener("change", search);
const KEYS = [
  ["/", "search"],
  ["Enter", "open what was searched for"],
  ["j, k or arrows", "next and previous feature of the table"],
  ["Esc", "back to the overview"],
];
listen(KEYS, {
  "/": () => byId("search").focus(),
  j: () => step(1),
  k: () => step(-1),
  ArrowDown: (event) => (event.target.closest("#view") ? false : step(1)),
  ArrowUp: (event) => (event.target.closest("#view") ? false : step(-1)),
  Escape: (event) => {
    if (byId("help").open) return false;
    if (event.target === byId("search")) byId("search").blur();
    return go();
  },
  Enter: (event) => {
    if (event.target !== byId("search") || !table.shown.length) return false;
    const exact = Number(byId("search").value.trim());
    return go(byId("search").value.trim() && Number.isInteger(exact) && exact < nFeatures ? exact : table.shown[0]);
  },
});
window.addEventListener("hashchange", show);
table.sort(columns.rises ? "rise" : "density", true);
search();
show();
