// A table of any length: only the rows in sight exist.

const ROW = 30;

class LongTable {
  /**
   * Of n rows. `columns`: {id, name, help, value(row), cell(row)}, with `up` where the least comes first, and `kind` for
   * a class that is not the id. `open` is called with the number of the row that was clicked; without it rows do nothing.
   */
  constructor(place, columns, n, open = null) {
    this.columns = columns;
    this.open = open;
    this.all = Int32Array.from({ length: n }, (_, i) => i);
    this.shown = this.all;
    this.selected = null;
    this.accepts = () => true;
    this.head = el("tr", {}, ...columns.map((column) => this.#header(column)));
    this.body = el("tbody");
    this.above = el("tbody", { "aria-hidden": "true" }, el("tr", {}, el("td")));
    this.below = this.above.cloneNode(true);
    const table = el("table", { class: open ? "long opens" : "long" }, el("thead", {}, this.head), this.above, this.body, this.below);
    this.place = place;
    this.table = table;
    place.append(table);
    place.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(place);
  }

  #header(column) {
    const button = el("button", { type: "button", title: column.help, onclick: () => this.sort(column.id) }, column.name);
    return el("th", { scope: "col", class: column.kind || column.id, "data-column": column.id }, button);
  }

  /** By a column; again for the other direction. */
  sort(id, down) {
    const { value, up = false } = this.columns.find((column) => column.id === id);
    if (down === undefined) down = this.by === id ? !this.down : !up;
    [this.by, this.down] = [id, down];
    const keys = Float64Array.from({ length: this.all.length }, (_, i) => value(i));
    const sign = down ? -1 : 1;
    // what is no number stands last either way; ties go to the lower row
    this.all.sort((a, b) => Number.isNaN(keys[a]) - Number.isNaN(keys[b]) || sign * (keys[a] - keys[b]) || a - b);
    for (const cell of this.head.children) {
      const own = cell.dataset.column === id;
      cell.setAttribute("aria-sort", own ? (down ? "descending" : "ascending") : "none");
    }
    this.filter(this.accepts);
  }

  filter(accepts) {
    this.accepts = accepts;
    this.shown = this.all.filter(accepts);
    this.place.scrollTop = 0;
    this.table.setAttribute("aria-rowcount", this.shown.length);
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.place.scrollTop / ROW) - 8);
    const last = Math.min(this.shown.length, first + Math.ceil(this.place.clientHeight / ROW) + 16);
    this.above.firstChild.firstChild.style.height = `${first * ROW}px`;
    this.below.firstChild.firstChild.style.height = `${(this.shown.length - last) * ROW}px`;
    this.body.replaceChildren(...Array.from(this.shown.subarray(first, last), (row, i) => this.#row(row, first + i)));
  }

  #row(row, place) {
    const cells = this.columns.map((column) => el("td", { class: column.kind || column.id }, column.cell(row)));
    const own = row === this.selected;
    const made = el("tr", { "data-row": row, "aria-rowindex": place + 1, class: own ? "selected" : null }, ...cells);
    if (this.open) made.addEventListener("click", () => this.open(row));
    return made;
  }

  /** Marks a row and brings it into sight. */
  select(row) {
    this.selected = row;
    const at = this.shown.indexOf(row), head = this.head.offsetHeight;
    if (at >= 0) {
      const top = at * ROW, bottom = top + ROW + head - this.place.clientHeight;
      if (top < this.place.scrollTop) this.place.scrollTop = top;
      else if (bottom > this.place.scrollTop) this.place.scrollTop = bottom;
    }
    this.draw();
  }

  /** The row so many further, the first where none is selected. */
  beside(step) {
    const at = this.shown.indexOf(this.selected);
    return this.shown[at < 0 ? 0 : Math.min(this.shown.length - 1, Math.max(0, at + step))];
  }
}
