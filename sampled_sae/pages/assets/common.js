"use strict";
// What all pages share: the data, elements made of text alone, numbers for people, the theme, the keys.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element with attributes and children; a child that is no element becomes text, never markup. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Four significant digits, without an exponent where few zeros do. */
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

/** For a narrow column: three significant digits. */
function brief(value) {
  const size = Math.abs(value);
  return size === 0 || (size >= 1e-3 && size < 1e5) ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

function percent(value) {
  return value === null || Number.isNaN(value) ? "–" : `${Number((100 * value).toPrecision(3))}%`;
}

function words(value) {
  if (typeof value === "number") return number(value);
  return value === null ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** A table of two columns. */
function pairs(entries) {
  const rows = entries.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, words(value))));
  return el("table", { class: "pairs" }, el("tbody", {}, ...rows));
}

/** A token's text, with what cannot be seen made visible. */
function visible(text) {
  return text.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥");
}

function token(text) {
  return el("span", { class: "token" }, visible(text));
}

/** The numbers that Python packed; Python writes them little-endian, as every browser's machine has them. */
function unpacked(text, Kind) {
  if (text === null) return null;
  return new Kind(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

function stored(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch {
    // a page from disk may have no storage
  }
  return null;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `switch to the ${theme === "dark" ? "light" : "dark"} theme`);
}

function switchTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(theme);
  stored("sampled-sae-theme", theme);
}

/**
 * own: key -> what to do, beside t and ?; explained: [key, words] of each for the dialog.
 * A key that goes into a field, or that comes with Ctrl or Alt, is left alone.
 */
function listen(explained, own) {
  const keys = { "?": () => byId("help").showModal(), t: switchTheme, ...own };
  byId("help").querySelector("h2").after(pairs([...explained, ["t", "light or dark"], ["?", "these keys"]]));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const typing = event.target.matches("input, select, textarea");
    if (typing && !["Escape", "Enter", "ArrowDown", "ArrowUp"].includes(event.key)) return;
    const act = keys[event.key];
    if (act && act(event) !== false) event.preventDefault();
  });
}

const dark = matchMedia("(prefers-color-scheme: dark)").matches;
setTheme(stored("sampled-sae-theme") || (dark ? "dark" : "light"));
byId("theme").addEventListener("click", switchTheme);
byId("keys").addEventListener("click", () => byId("help").showModal());
