// The table of runs: a row each, sorted by any column, with a box that switches the run on and off.

class RunsTable {
  /** `switched` is called after a run was switched. */
  constructor(place, runs, metrics, switched) {
    this.runs = runs;
    this.metrics = metrics;
    this.switched = switched;
    this.body = el("tbody");
    const columns = [["name", "run"], ["l", "l"], ["seed", "seed"], ...metrics];
    this.head = el("tr", {}, el("th", { scope: "col" }, "on"), ...columns.map(([id, name]) => this.#header(id, name)));
    place.append(el("table", { class: "runs" }, el("thead", {}, this.head), this.body));
    this.draw();
  }

  #header(id, name) {
    const button = el("button", { type: "button", onclick: () => this.sort(id) }, name);
    return el("th", { scope: "col", "data-column": id }, button);
  }

  #value(run, id) {
    return id === "name" || id === "l" || id === "seed" ? run[id] : run.values[id];
  }

  sort(id) {
    this.down = this.by === id ? !this.down : false;
    this.by = id;
    const missing = (value) => value === null || value === undefined;
    const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * (this.down ? -1 : 1);
    this.runs.sort((one, other) => {
      const [a, b] = [this.#value(one, id), this.#value(other, id)];
      return missing(a) - missing(b) || (missing(a) ? 0 : order(a, b));
    });
    for (const cell of this.head.children) {
      cell.setAttribute("aria-sort", cell.dataset.column !== id ? "none" : this.down ? "descending" : "ascending");
    }
    this.draw();
  }

  draw() {
    this.body.replaceChildren(...this.runs.map((run) => this.#row(run)));
  }

  #row(run) {
    const box = el("input", { type: "checkbox", "aria-label": `show ${run.name}` });
    box.checked = run.on;
    box.addEventListener("change", () => { run.on = box.checked; this.switched(); });
    const name = run.link ? el("a", { href: run.link }, run.name) : run.name;
    const values = [run.l === null ? "–" : number(run.l), number(run.seed), ...this.metrics.map(([id]) => number(run.values[id]))];
    return el("tr", { "data-run": run.name }, el("td", {}, box), el("th", { scope: "row" }, name), ...values.map((value) => el("td", { class: "figure" }, value)));
  }
}
