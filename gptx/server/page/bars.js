/** A list of tokens with bars, for the detail beside the views. */

import { make } from "./dom.js";

/**
 * Return a list of rows.
 *
 * @param {object[]} rows
 * @param {string} rows[].label Text of the row.
 * @param {number | null} rows[].share Length of the bar, 0 to 1; null for none.
 * @param {number} [rows[].ghost] Length of a second bar behind it: the value before a change.
 * @param {string} rows[].value What the row says at its end.
 * @param {string} [rows[].note] Words after the label.
 * @param {boolean} [rows[].marked] True for the token that the text has.
 * @param {() => void} [rows[].press] Action of the row; without it, the row is no button.
 * @param {string | null} [rows[].title] Words that a pointer over the row shows.
 */
export function barList(rows) {
  return make("ol.bars", {}, ...rows.map(rowOf));
}

function rowOf(row) {
  const bar = make("span.bar", { "aria-hidden": "true" });
  if (row.ghost !== undefined) bar.append(length("span.ghost", row.ghost));
  if (row.share !== null) bar.append(length("span.fill", row.share));
  const label = make("span.label", {}, row.label);
  if (row.note) label.append(make("span.note", {}, ` ${row.note}`));
  const parts = [label, bar, make("span.value", {}, row.value)];
  const classes = `row${row.marked ? ".marked" : ""}${row.share === 0 ? ".dropped" : ""}`;
  const content = row.press
    ? make(`button.${classes}`, { type: "button", click: row.press, title: row.title }, ...parts)
    : make(`div.${classes}`, { title: row.title }, ...parts);
  return make("li", {}, content);
}

function length(name, share) {
  const element = make(name);
  element.style.width = `${(100 * share).toFixed(2)}%`;
  return element;
}
