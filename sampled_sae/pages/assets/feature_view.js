// One feature in full.

const parts = new Map();
const place = new Map(Array.from(unpacked(data.shown, Int32Array), (feature, i) => [feature, i]));

/** The details of a feature, or null where the page has none of it. */
async function details(feature) {
  if (!place.has(feature)) return null;
  const at = place.get(feature), i = Math.floor(at / data.part);
  if (!parts.has(i)) parts.set(i, unzipped(await partText(i)));
  return (await parts.get(i))[at % data.part];
}

/** The text of a part; a page that is still being read may not have it yet. */
async function partText(i) {
  const found = document.getElementsByClassName("part");
  if (i >= found.length && document.readyState === "loading") {
    await new Promise((ready) => document.addEventListener("DOMContentLoaded", ready, { once: true }));
  }
  return found[i].textContent;
}

function unzipped(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

/** The text of a word; numbers need a space between them. */
function wordText(word) {
  return data.has.model ? data.words[word] : `${data.words[word]} `;
}

function context(found, greatest) {
  const on = new Map(found.on);
  const spans = found.words.map((word, i) => {
    const value = on.get(i) || 0;
    const text = data.words[word].trim() || JSON.stringify(data.words[word]);
    const span = el("span", { class: i === found.at ? "token peak" : "token", title: value ? `${text}: ${number(value)}` : null }, visible(wordText(word)));
    if (value) span.style.setProperty("--on", `${Math.round(12 + 78 * Math.min(1, value / greatest))}%`);
    if (value) span.classList.add("on");
    return span;
  });
  const where = `row ${found.row}, position ${found.position}`;
  return el("li", { title: where }, el("span", { class: "value" }, number(found.value)), el("p", { class: "text" }, ...spans));
}

function contexts(title, list, greatest) {
  if (!list.length) return null;
  return el("section", {}, el("h3", {}, title), el("ol", { class: "contexts" }, ...list.map((one) => context(one, greatest))));
}

function lensTable(title, list) {
  const rows = list.map(([word, logit]) => el("tr", {}, el("td", {}, token(wordText(word))), el("td", { class: "figure" }, number(logit))));
  return el("section", {}, el("h3", {}, title), el("table", { class: "short" }, el("tbody", {}, ...rows)));
}

function featureLink(feature) {
  return el("a", { href: `#feature=${feature}` }, String(feature));
}

function company(title, names, list) {
  if (!list.length) return null;
  const rows = list.map(([feature, ...values]) =>
    el("tr", {}, el("td", {}, featureLink(feature)), ...values.map((value) => el("td", { class: "figure" }, number(value))), el("td", {}, ...topWords(feature, 3))));
  const head = el("tr", {}, ...[...names, data.has.text ? "most active on" : ""].map((name) => el("th", { scope: "col" }, name)));
  return el("section", {}, el("h3", {}, title), el("table", { class: "short" }, el("thead", {}, head), el("tbody", {}, ...rows)));
}

/** The words on which a feature is most active, each once. */
function topWords(feature, n) {
  if (!columns.keys) return [];
  const own = columns.keys.subarray(feature * data.keys, (feature + 1) * data.keys);
  return [...new Set(own)].filter((word) => word >= 0).slice(0, n).map((word) => token(wordText(word)));
}

async function featureView(feature) {
  const found = await details(feature);
  const count = columns.counts[feature];
  const facts = [
    ["active on", `${number(count)} of ${number(data.measured.tokens)} tokens (${percent(count / data.measured.tokens)})`],
    ["mean activation where active", columns.means[feature]],
    ["greatest activation", columns.maxima[feature]],
  ];
  if (columns.rises) facts.push(["FVU rises without it by", columns.rises[feature]]);
  const view = el("article", { "aria-label": `feature ${feature}` }, el("h2", {}, `Feature ${feature}`), pairs(facts));
  if (!found) {
    const reason = count ? "The page was made without the rest of this feature; --features chooses which it has." : "It is active on none of these tokens.";
    view.append(el("p", { class: "quiet" }, reason));
    return view;
  }
  const greatest = columns.maxima[feature], step = greatest / found.histogram.length;
  if (found.histogram.length) {
    const edges = Array.from({ length: found.histogram.length + 1 }, (_, i) => i * step);
    view.append(figure("How strongly it is active", barChart(found.histogram, edges, { xName: "activation", yName: "tokens", label: `histogram of the activations of feature ${feature}` })));
  }
  if (data.has.lens) view.append(el("div", { class: "beside" }, lensTable("Its decoder row raises", found.raised), lensTable("and lowers", found.lowered)));
  if (!data.has.text) view.append(el("p", { class: "quiet" }, "No contexts: nothing says where in texts these tokens stand."));
  const quarters = ["strongest", "second", "third", "weakest"];
  view.append(...[
    contexts("Where it is most active", found.top, greatest),
    ...found.quarters.map((list, i) => contexts(`From its ${quarters[i]} quarter`, list, greatest)),
    el("div", { class: "beside" }, ...[
      company("Features that fire with it", ["feature", "overlap", "share of its tokens"], found.company),
      company("Nearest decoder rows", ["feature", "cosine"], found.neighbours),
    ].filter(Boolean)),
  ].filter(Boolean));
  return view;
}
