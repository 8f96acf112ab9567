// A list of any length of which only what is seen is in the document; newest first. All content is text, never markup.

const MOST_ROWS = 5_000;
const MOST_CHARACTERS = 8_000_000;
const BEYOND = 6; // rows above and below what is seen

const element = (kind, className) => Object.assign(document.createElement(kind), { className });

export const ago = (ms) => {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3_600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 86_400 ? `${Math.floor(seconds / 3_600)} h` : `${Math.floor(seconds / 86_400)} d`;
};

export const took = (ms) => {
  if (ms >= 1_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
};

/** Items, the oldest first. Of too many, or too much of them, the oldest are dropped. */
export class Items {
  all = [];
  #characters = 0;

  add(items) {
    for (const item of items) {
      this.#characters += item.json?.length ?? 0;
      this.all.push(item);
    }
    let dropped = 0;
    while (this.all.length - dropped > MOST_ROWS || (this.#characters > MOST_CHARACTERS && dropped < this.all.length - 1)) {
      this.#characters -= this.all[dropped].json?.length ?? 0;
      dropped += 1;
    }
    this.all.splice(0, dropped);
  }

  /** All of them; none is left. */
  take() {
    this.#characters = 0;
    return this.all.splice(0);
  }
}

export class List {
  #box;
  #rows;
  #kept = new Items();
  #pool = [];
  #selected = null;
  #open;
  #numbers = 0;

  constructor(box, rows, open) {
    this.#box = box;
    this.#rows = rows;
    this.#open = open;
    box.addEventListener("scroll", () => this.render(), { passive: true });
    box.addEventListener("keydown", (event) => this.#onKey(event));
    rows.addEventListener("click", ({ target }) => {
      const row = target.closest(".row");
      if (row?.item) this.#choose(row.item, true);
    });
    new ResizeObserver(() => this.render()).observe(box);
  }

  get items() {
    return this.#kept.all;
  }

  clear() {
    this.#kept.take();
    this.#selected = null;
    this.#box.scrollTop = 0;
    this.render();
  }

  /** Add items, oldest first. Whoever has scrolled down goes on seeing what is seen now. */
  add(items) {
    for (const item of items) item.number = this.#numbers += 1;
    this.#kept.add(items);
    if (this.#box.scrollTop > 0) {
      this.#resize();
      this.#box.scrollTop += items.length * this.#height();
    }
    this.render();
  }

  #height() {
    return parseFloat(getComputedStyle(this.#rows).getPropertyValue("--row"));
  }

  #resize() {
    this.#rows.style.height = `${this.items.length * this.#height()}px`;
  }

  render() {
    const height = this.#height();
    this.#resize();
    const first = Math.max(0, Math.floor(this.#box.scrollTop / height) - BEYOND);
    const count = Math.min(this.items.length - first, Math.ceil(this.#box.clientHeight / height) + 2 * BEYOND);
    const now = Date.now();
    while (this.#pool.length < count) this.#pool.push(this.#rows.appendChild(makeRow()));
    this.#pool.forEach((row, index) => {
      row.hidden = index >= count;
      if (row.hidden) return;
      const item = this.items[this.items.length - 1 - first - index];
      row.style.transform = `translateY(${(first + index) * height}px)`;
      if (row.item !== item) fill(row, item);
      row.age.textContent = item.publishedAt ? ago(now - item.publishedAt) : "";
      row.setAttribute("aria-selected", String(item === this.#selected));
      row.setAttribute("aria-posinset", String(first + index + 1));
      row.setAttribute("aria-setsize", String(this.items.length));
    });
    const active = this.#pool.find((row) => !row.hidden && row.item === this.#selected);
    if (active) this.#box.setAttribute("aria-activedescendant", active.id);
    else this.#box.removeAttribute("aria-activedescendant");
  }

  #onKey(event) {
    const last = this.items.length - 1;
    const at = this.#selected ? this.items.indexOf(this.#selected) : -1;
    const page = Math.max(1, Math.floor(this.#box.clientHeight / this.#height()) - 1);
    const to = { ArrowDown: at < 0 ? last : at - 1, ArrowUp: at < 0 ? last : at + 1, PageDown: at - page, PageUp: at + page, Home: last, End: 0 }[event.key];
    if (to !== undefined && last >= 0) {
      event.preventDefault();
      this.#choose(this.items[Math.max(0, Math.min(last, to))], false);
    } else if ((event.key === "Enter" || event.key === " ") && this.#selected) {
      event.preventDefault();
      this.#choose(this.#selected, true);
    }
  }

  #choose(item, opens) {
    this.#selected = item;
    const height = this.#height();
    const top = (this.items.length - 1 - this.items.indexOf(item)) * height;
    const box = this.#box;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + height > box.scrollTop + box.clientHeight) box.scrollTop = top + height - box.clientHeight;
    this.render();
    if (opens && item.kind === "event") this.#open(item);
  }
}

let ids = 0;

function makeRow() {
  const row = element("div", "row");
  row.id = `row-${(ids += 1)}`;
  row.setAttribute("role", "option");
  row.parts = ["tag", "type", "source", "data", "ms", "age"].map((name) => row.appendChild(element("span", name)));
  row.age = row.parts[5];
  return row;
}

function fill(row, item) {
  row.item = item;
  const isEvent = item.kind === "event";
  row.className = `row ${isEvent ? item.severity : item.kind}`;
  const texts = isEvent
    ? [item.severity, item.type, item.source, item.summary, item.latency === null ? "" : took(item.latency)]
    : ["", item.text, "", "", ""];
  texts.forEach((text, index) => {
    row.parts[index].textContent = text;
    row.parts[index].hidden = !isEvent && index !== 1;
  });
  row.title = isEvent ? `${item.type} – ${item.source}` : item.text;
}
