/** Elements of the page. */

/**
 * Return a new element.
 *
 * @param {string} name Name of the element, and classes: "button.primary".
 * @param {object} properties Attributes; functions are event listeners, booleans set or omit.
 * @param {...(Node | string | null)} children
 */
export function make(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Return the element with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Let arrow keys move the focus among the children of an element; one of them is in the tab order.
 *
 * @param {HTMLElement} parent Its children that match `selector` are buttons or cells.
 * @param {string} selector
 * @param {(element: HTMLElement, key: string) => HTMLElement | null | undefined} step Next element
 *   for a key; null keeps the focus, undefined leaves the key to the browser.
 */
export function rove(parent, selector, step) {
  parent.addEventListener("keydown", (event) => {
    const from = event.target.closest(selector);
    if (!from || event.altKey || event.ctrlKey || event.metaKey) return;
    const to = step(from, event.key);
    if (to === undefined) return;
    event.preventDefault();
    if (to) to.focus();
  });
  parent.addEventListener("focusin", (event) => {
    const element = event.target.closest(selector);
    if (!element) return;
    for (const other of parent.querySelectorAll(`${selector}[tabindex="0"]`)) other.tabIndex = -1;
    element.tabIndex = 0;
  });
}

/** Return the element that a key of a row leads to: arrows, Home, End. */
export function stepInRow(elements, from, key) {
  const i = elements.indexOf(from);
  const next = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: elements.length - 1 }[key];
  return next === undefined ? undefined : (elements[next] ?? null);
}

/** Return a function that calls `work` once, `ms` milliseconds after its last call. */
export function debounced(work, ms) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...args), ms);
  };
}
