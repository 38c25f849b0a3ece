// Charts as SVG: lines with a band, and bars. Axes are named, and the curves stay clear of words.

const WIDTH = 460, HEIGHT = 260, LEFT = 62, RIGHT = 14, TOP = 12, BOTTOM = 44;

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The i-th of n colours, none like another, readable on both themes. */
function color(i, n) {
  const hue = Math.round((360 * i) / Math.max(n, 1) + 212) % 360;
  const shift = n > 8 && i % 2 ? 12 : 0;
  return `light-dark(hsl(${hue} 72% ${34 + shift}%), hsl(${hue} 78% ${62 + shift}%))`;
}

/** A scale from values to pixels with its ticks; `log` is the base of a logarithmic one, or 0. */
function scale(low, high, from, to, log = 0) {
  if (!(high > low)) [low, high] = log ? [low / 2, low * 2] : [low - 1, low + 1];
  const at = log ? Math.log : (x) => x;
  const place = (x) => from + ((at(x) - at(low)) / (at(high) - at(low))) * (to - from);
  const ticks = log ? logTicks(low, high, log) : evenTicks(low, high);
  return { place, ticks, low, high };
}

function evenTicks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((m) => m * power >= rough) || 10);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, base) {
  const first = Math.ceil(Math.log(low) / Math.log(base) - 1e-9), last = Math.floor(Math.log(high) / Math.log(base) + 1e-9);
  const every = Math.max(1, Math.ceil((last - first) / 6)), ticks = [];
  for (let i = first; i <= last; i += every) ticks.push(base ** i);
  return ticks.length > 1 ? ticks : evenTicks(low, high).filter((tick) => tick > 0);
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return size && size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3)));
}

/** An empty chart: frame, grid, ticks and the names of the axes. */
function frame(x, y, xName, yName, label) {
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, class: "chart" });
  for (const tick of y.ticks) {
    const at = y.place(tick);
    chart.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at, class: "grid" }));
    chart.append(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, tickText(tick)));
  }
  for (const tick of x.ticks) {
    chart.append(svg("text", { x: x.place(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, tickText(tick)));
  }
  const middle = (TOP + HEIGHT - BOTTOM) / 2;
  chart.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "axis" }));
  chart.append(svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, xName));
  chart.append(svg("text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, yName));
  return chart;
}

/**
 * Lines over each other. Each of `lines` has name, color and points [x, y]; with `band` [x, low, high], `dash`, `dots`
 * at the points, `loose` for dots alone, and `level` with `levelBand` [low, high] in place of points for a level line.
 */
function lineChart(lines, { xName, yName, xLog = 0, yLog = 0, label }) {
  const usable = (value, log) => value !== null && Number.isFinite(value) && (!log || value > 0);
  const kept = lines.map((line) => ({
    ...line,
    points: (line.points || []).filter(([x, y]) => usable(x, xLog) && usable(y, yLog)),
    band: (line.band || []).filter(([, low, high]) => usable(low, yLog) && usable(high, yLog)),
  }));
  const xs = kept.flatMap((line) => line.points.map(([x]) => x));
  const ys = kept.flatMap((line) => [
    ...line.points.map(([, y]) => y), ...line.band.flatMap(([, low, high]) => [low, high]),
    ...(line.level === undefined ? [] : [line.level, ...(line.levelBand || [])].filter((value) => usable(value, yLog))),
  ]);
  if (!ys.length) return el("p", { class: "quiet" }, `No ${yName} to show.`);
  const [low, high] = [Math.min(...ys), Math.max(...ys)], margin = yLog ? 0 : (high - low) * 0.05;
  const x = scale(xs.length ? Math.min(...xs) : 1, xs.length ? Math.max(...xs) : 2, LEFT + 8, WIDTH - RIGHT - 8, xLog);
  // what cannot be below 0 gets no axis there
  const y = scale(low >= 0 && !yLog ? Math.max(0, low - margin) : low - margin, high + margin, HEIGHT - BOTTOM, TOP, yLog);
  const chart = frame(x, y, xName, yName, label);
  for (const line of kept) {
    const title = svg("title", {}, line.name);
    const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${x.place(a).toFixed(1)} ${y.place(b).toFixed(1)}`).join("");
    const band = line.levelBand ? [[x.low, ...line.levelBand], [x.high, ...line.levelBand]] : line.band;
    if (band.length > 1) {
      const upper = band.map(([a, , b]) => [a, b]), lower = band.map(([a, b]) => [a, b]).reverse();
      const area = svg("path", { d: `${path(upper)}L${path(lower).slice(1)}Z`, class: "band" });
      area.style.fill = line.color;
      chart.append(area);
    }
    const d = line.level === undefined ? path(line.points) : `M${LEFT} ${y.place(line.level)}H${WIDTH - RIGHT}`;
    const drawn = svg("path", { d: line.loose ? "" : d, class: "line", "stroke-dasharray": line.dash || "none" }, title);
    drawn.style.stroke = line.color;
    chart.append(drawn);
    for (const [a, b] of line.dots ? line.points : []) {
      const dot = svg("circle", { cx: x.place(a), cy: y.place(b), r: 3.5 }, svg("title", {}, `${line.name}: ${number(a)}, ${number(b)}`));
      dot.style.fill = line.color;
      chart.append(dot);
    }
  }
  return chart;
}

/** Bars between edges; a number of edges one above that of the values. */
function barChart(values, edges, { xName, yName, xLog = 0, label }) {
  const x = scale(edges[0], edges[edges.length - 1], LEFT, WIDTH - RIGHT, xLog);
  const y = scale(0, Math.max(1, ...values) * 1.05, HEIGHT - BOTTOM, TOP);
  const chart = frame(x, y, xName, yName, label);
  values.forEach((value, i) => {
    const [from, to] = [x.place(edges[i]), x.place(edges[i + 1])], top = y.place(value);
    const box = { x: from + 0.5, y: top, width: Math.max(0.5, to - from - 1), height: HEIGHT - BOTTOM - top, class: "bar" };
    chart.append(svg("rect", box, svg("title", {}, `${number(edges[i])} to ${number(edges[i + 1])}: ${number(value)}`)));
  });
  return chart;
}

/** A chart with its title above and, for several lines, their names below, off the curves. */
function figure(title, chart, lines = []) {
  const names = lines.map((line) => {
    const swatch = el("span", { class: "swatch" });
    swatch.style.background = line.color;
    return el("li", {}, swatch, line.name);
  });
  return el("figure", {}, title ? el("figcaption", {}, title) : null, chart, names.length > 1 ? el("ul", { class: "legend" }, ...names) : null);
}
