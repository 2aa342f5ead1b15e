// A table that sorts, filters and keeps its rows: a row that is still there is changed in place, so focus and selection stay.

import { label, make, put } from "./dom.js";

export class Table {
  // columns: key, title, value(row) for sorting and export, fill(cell, row) or text(row), numeric, unsorted.
  constructor(host, { name, columns, key, sort, descending = true, most = 100, empty, mark = null, caption }) {
    Object.assign(this, { columns, key, sort, descending, most, mark, shown: most, rows: [], kept: new Map(), sorted: [], onChange: null });
    const heads = columns.map((column) => {
      const button = column.unsorted
        ? make("span", {}, column.title)
        : make("button", { type: "button", onclick: () => this.sortBy(column.key) }, column.title);
      if (column.hint) button.title = column.hint;
      return make("th", { scope: "col", role: "columnheader", class: `c-${column.key} ${column.numeric ? "num" : ""}` }, button);
    });
    this.heads = heads;
    this.body = make("tbody", { role: "rowgroup" });
    this.table = make("table", { role: "table", "aria-label": caption }, make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)), this.body);
    this.empty = make("p", { class: "empty" }, empty);
    this.wrap = make("div", { class: "wrap" }, this.table);
    this.more = make("button", { type: "button", class: "more-rows", hidden: true, onclick: () => this.showMore() });
    host.className = name;
    host.append(this.wrap, this.empty, this.more);
    this.tellSort();
  }

  showMore() {
    this.shown += this.most;
    this.update(this.rows);
  }

  sortBy(key) {
    const numeric = this.columns.find((column) => column.key === key).numeric;
    this.descending = key === this.sort ? !this.descending : Boolean(numeric);
    this.sort = key;
    this.tellSort();
    this.update(this.rows);
  }

  tellSort() {
    this.columns.forEach((column, index) => {
      if (column.key === this.sort) this.heads[index].setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else this.heads[index].removeAttribute("aria-sort");
    });
  }

  order(rows) {
    const { value } = this.columns.find((column) => column.key === this.sort);
    const way = this.descending ? -1 : 1;
    const empty = (v) => v === null || v === undefined || v === "" || Number.isNaN(v);
    return rows
      .map((row) => [value(row), row])
      .sort(([a], [b]) => {
        if (empty(a) || empty(b)) return empty(a) - empty(b); // last either way
        if (typeof a === "number" && typeof b === "number") return way * (a - b);
        return way * String(a).localeCompare(String(b), "en", { numeric: true });
      })
      .map(([, row]) => row);
  }

  update(rows) {
    this.rows = rows;
    this.sorted = this.order(rows);
    const visible = this.sorted.slice(0, this.shown);
    const wanted = new Set(visible.map(this.key));
    for (const [key, tr] of this.kept)
      if (!wanted.has(key)) {
        tr.remove();
        this.kept.delete(key);
      }
    let next = this.body.firstElementChild;
    for (const row of visible) {
      const key = this.key(row);
      let tr = this.kept.get(key);
      if (tr === undefined) {
        tr = this.makeRow();
        this.kept.set(key, tr);
      }
      if (tr === next) next = next.nextElementSibling;
      else this.body.insertBefore(tr, next);
      this.fill(tr, row);
    }
    this.empty.hidden = rows.length > 0;
    this.wrap.hidden = rows.length === 0;
    this.more.hidden = this.sorted.length <= this.shown;
    if (!this.more.hidden) put(this.more, `Show more (${this.sorted.length - this.shown} left)`);
  }

  makeRow() {
    return make("tr", { role: "row" }, ...this.columns.map((column) =>
      make("td", { role: "cell", class: `c-${column.key} ${column.numeric ? "num" : ""}`, "data-title": column.title })));
  }

  fill(tr, row) {
    if (this.mark) label(tr, "class", this.mark(row));
    this.columns.forEach((column, index) => {
      const cell = tr.children[index];
      if (column.fill) column.fill(cell, row);
      else put(cell, column.text ? column.text(row) : column.value(row));
    });
  }
}

// A cell's own elements, made once.
export function parts(cell, build) {
  cell.parts ??= build(cell);
  return cell.parts;
}
