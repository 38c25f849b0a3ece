// The page of two SAEs side by side: figures, charts, the pairs of features, and what each SAE has alone.

const SIDES = ["A", "B"];
const looks = data.looks.map((look) => {
  if (!look) return null;
  const lower = look.words.map((word) => word.toLowerCase());
  let found = null;
  const rank = () => (found ??= ranks(lower.map((word) => word.trim())));
  return { ...look, keys: unpacked(look.keys, Int32Array), lower, rank };
});
const pairColumns = {
  features: data.pairs.features.map((text) => unpacked(text, Int32Array)),
  cosine: unpacked(data.pairs.cosine, Float32Array),
  shared: unpacked(data.pairs.shared, Int32Array),
  jaccard: unpacked(data.pairs.jaccard, Float32Array),
  activation: unpacked(data.pairs.activation, Float32Array),
  active: data.pairs.active.map((text) => unpacked(text, Int32Array)),
};
const aloneColumns = data.alone.map((side) => ({
  features: unpacked(side.features, Int32Array),
  nearest: unpacked(side.nearest, Float32Array),
  active: unpacked(side.active, Int32Array),
}));

/** The place of each text among all when they are sorted. */
function ranks(texts) {
  const order = texts.map((_, i) => i).sort((a, b) => (texts[a] < texts[b] ? -1 : texts[a] > texts[b] ? 1 : a - b));
  const rank = new Int32Array(texts.length);
  order.forEach((i, place) => { rank[i] = place; });
  return rank;
}

/** The numbers of a feature's words, each once. */
function wordsOf(side, feature) {
  const look = looks[side];
  if (!look || !look.keys) return [];
  return [...new Set(look.keys.subarray(feature * look.width, (feature + 1) * look.width))].filter((word) => word >= 0);
}

function tokens(side, feature) {
  return el("span", {}, ...wordsOf(side, feature).slice(0, 3).map((word) => token(looks[side].words[word])));
}

/** Its number, which leads to its page where there is one. */
function featureLink(side, feature) {
  return looks[side] ? el("a", { href: `${looks[side].href}#feature=${feature}` }, String(feature)) : String(feature);
}

const share = (value) => (Number.isNaN(value) ? "–" : value.toFixed(3));

function featureColumn(side, features) {
  const name = SIDES[side];
  return { id: `feature-${name}`, kind: "number", name, help: `number of the feature in ${name}`, up: true, value: (i) => features[i], cell: (i) => featureLink(side, features[i]) };
}

function activeColumn(side, active) {
  return active && { id: `active-${SIDES[side]}`, kind: "active", name: `active ${SIDES[side]}`, help: `tokens on which it is active in ${SIDES[side]}, of ${number(data.tokens)}`, value: (i) => active[i], cell: (i) => number(active[i]) };
}

function wordsColumn(side, features) {
  const look = looks[side];
  if (!look || !look.keys) return null;
  const first = (i) => { const [word] = wordsOf(side, features[i]); return word === undefined ? NaN : look.rank()[word]; };
  return { id: `words-${SIDES[side]}`, kind: "words", name: `${SIDES[side]} most active on`, help: "tokens of its greatest activations", up: true, value: first, cell: (i) => tokens(side, features[i]) };
}

function pairTable() {
  const { features, cosine, jaccard, activation, active } = pairColumns;
  const columns = [
    ...[0, 1].map((side) => featureColumn(side, features[side])),
    { id: "cosine", kind: "share", name: "cosine", help: "of the decoder rows", value: (i) => cosine[i], cell: (i) => share(cosine[i]) },
    jaccard && { id: "jaccard", kind: "share", name: "Jaccard", help: "tokens on which both are active over those on which one is", value: (i) => jaccard[i], cell: (i) => share(jaccard[i]) },
    activation && { id: "activation", kind: "share", name: "in codes", help: "cosine of their activations over all tokens", value: (i) => activation[i], cell: (i) => share(activation[i]) },
    ...[0, 1].map((side) => activeColumn(side, active[side])),
    ...[0, 1].map((side) => wordsColumn(side, features[side])),
  ];
  return new LongTable(byId("pairs"), columns.filter(Boolean), cosine.length);
}

function aloneTable(side) {
  const { features, nearest, active } = aloneColumns[side];
  const columns = [
    featureColumn(side, features),
    { id: "nearest", kind: "share", name: "nearest", help: `cosine to the nearest feature of ${SIDES[1 - side]}`, value: (i) => nearest[i], cell: (i) => share(nearest[i]) },
    activeColumn(side, active),
    wordsColumn(side, features),
  ];
  return new LongTable(byId(`alone-${side}`), columns.filter(Boolean), features.length);
}

/** Accepts the features of a side whose number begins with the text, or with a token that has the text in it. */
function matching(side, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return () => true;
  const digits = /^\d+$/.test(wanted);
  const look = looks[side], found = new Set();
  if (look && look.keys) {
    const hit = Uint8Array.from(look.lower, (word) => word.includes(wanted));
    look.keys.forEach((word, i) => { if (word >= 0 && hit[word]) found.add(Math.floor(i / look.width)); });
  }
  return (feature) => found.has(feature) || (digits && String(feature).startsWith(wanted));
}

function say(id, table, total, whole) {
  const have = table.all.length, shown = table.shown.length;
  const limit = have < total ? `; the page has ${number(have)} of ${number(total)}, matches.csv all` : "";
  byId(`${id}-count`).textContent = `${number(shown)} of ${number(have)} ${whole}${limit}`;
}

function search() {
  const text = byId("search").value, sharedAlone = byId("shared").checked;
  const accepts = [0, 1].map((side) => matching(side, text));
  const [a, b] = pairColumns.features;
  paired.filter((i) => (!sharedAlone || pairColumns.shared[i] === 1) && (accepts[0](a[i]) || accepts[1](b[i])));
  say("pairs", paired, data.pairs.total, "pairs");
  for (const side of [0, 1]) {
    alone[side].filter((i) => accepts[side](aloneColumns[side].features[i]));
    say(`alone-${side}`, alone[side], data.alone[side].total, "features");
  }
  const kept = new URLSearchParams([...(text ? [["search", text]] : []), ...(sharedAlone ? [["shared", "1"]] : [])]);
  history.replaceState(null, "", `#${kept}`);
}

/** Bars without the empty ones below 0. */
function cosineChart(counts, title, xName, yName) {
  const zero = data.edges.indexOf(0), first = counts.findIndex((count) => count > 0);
  const from = first < 0 ? zero : Math.min(zero, first);
  return figure(title, barChart(counts.slice(from), data.edges.slice(from), { xName, yName, label: title }));
}

function charts() {
  const made = [cosineChart(data.cosines[0], "Pairs by cosine", "cosine of decoder rows", "pairs")];
  for (const side of [0, 1]) {
    made.push(cosineChart(data.cosines[side + 1], `Features of ${SIDES[side]} by their nearest in ${SIDES[1 - side]}`, "cosine with the nearest feature", "features"));
  }
  const on = data.on_activations;
  if (!on) return made;
  const bars = (counts, title, xName) => figure(title, barChart(counts, on.edges, { xName, yName: "pairs", label: title }));
  const line = { name: "median, shaded from the first to the third quartile", color: color(0, 1), dots: true };
  const points = on.quartiles.map(([x, , median]) => [x, median]), band = on.quartiles.map(([x, low, , high]) => [x, low, high]);
  const title = "Tokens that pairs share, by cosine: median and quartiles";
  return [
    ...made,
    figure(title, lineChart([{ ...line, points, band }], { xName: "cosine of decoder rows", yName: "Jaccard of active tokens", label: title })),
    bars(on.jaccard, "Shared pairs by the tokens of both", "Jaccard of active tokens"),
    bars(on.activation, "Shared pairs by their activations", "cosine of activations"),
  ];
}

function figuresTable() {
  const value = (cell) => (cell === "" ? "" : words(cell));
  const rows = data.figures.map(([name, ...cells]) => el("tr", {}, el("th", { scope: "row" }, name), ...cells.map((cell) => el("td", { class: "figure" }, value(cell)))));
  const name = (side) => (looks[side] ? el("a", { href: looks[side].href }, data.names[side]) : data.names[side]);
  const heads = ["", ...[0, 1].map((side) => el("span", {}, `${SIDES[side]}: `, name(side))), "both"];
  const head = el("tr", {}, ...heads.map((one) => el("th", { scope: "col", class: "figure" }, one)));
  return el("table", { class: "short" }, el("thead", {}, head), el("tbody", {}, ...rows));
}

byId("title").textContent = data.name;
byId("figures").append(figuresTable());
byId("about").append(pairs(Object.entries(data.about)));
byId("charts").append(...charts());
byId("shared-label").textContent = `only pairs with a cosine of at least ${number(data.same)}`;
byId("search").placeholder = looks.some((look) => look && look.keys) ? "a number or a token" : "a number";
const wanted = new URLSearchParams(location.hash.slice(1));
byId("search").value = wanted.get("search") || "";
byId("shared").checked = wanted.get("shared") === "1";
const paired = pairTable(), alone = [aloneTable(0), aloneTable(1)];
byId("search").addEventListener("input", search);
byId("shared").addEventListener("change", search);
const KEYS = [
  ["/", "search"],
  ["Esc", "leave the search"],
  ["s", "pairs of one feature alone, or all"],
];
listen(KEYS, {
  "/": () => byId("search").focus(),
  s: () => byId("shared").click(),
  Escape: (event) => (event.target === byId("search") ? byId("search").blur() : false),
});
paired.sort("cosine", true);
for (const side of alone) side.sort("nearest", false);
search();
