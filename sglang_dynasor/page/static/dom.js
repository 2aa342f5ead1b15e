// Elements and numbers. Whatever comes from a server goes into the page by `textContent`; nothing here reads HTML.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Only what changed touches the page: most cells are the same twice a second.
export function put(element, text) {
  const value = text === null || text === undefined ? "" : String(text);
  if (element.textContent !== value) element.textContent = value;
}

export function label(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

export const byId = (id) => document.getElementById(id);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (value) => (Number.isFinite(value) ? whole.format(value) : "");
export const brief = (value) => (Number.isFinite(value) ? (Math.abs(value) < 10_000 ? whole : short).format(value) : "");
export const share = (value) => (Number.isFinite(value) ? value.toFixed(2) : "");
export const percent = (value) => (Number.isFinite(value) ? `${Math.round(100 * value)} %` : "");
export const many = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

export function money(value) {
  if (!Number.isFinite(value)) return "";
  return value.toLocaleString("en", { maximumSignificantDigits: 3, maximumFractionDigits: 4 });
}

export function seconds(value) {
  if (!Number.isFinite(value)) return "";
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

export function clock(time_s) {
  return Number.isFinite(time_s) ? new Date(1000 * time_s).toLocaleTimeString("en-GB") : "";
}

export function answered(answer) {
  return answer === null || answer === undefined ? "no answer" : String(answer);
}
