/** The tabs: one panel is visible, arrow keys move between the tabs. */

import { rove, stepInRow } from "./dom.js";

/** Let the tabs of a list choose `state.tab`: the part of their ids after "tab-". */
export function tabs(list, store) {
  const all = [...list.querySelectorAll('[role="tab"]')];
  const choose = (tab) => store.set({ tab: tab.id.slice("tab-".length) });
  rove(list, '[role="tab"]', (from, key) => stepInRow(all, from, key));
  list.addEventListener("focusin", (event) => choose(event.target));
  list.addEventListener("click", (event) => {
    const tab = event.target.closest('[role="tab"]');
    if (tab) choose(tab);
  });
  store.subscribe(({ tab }, before) => {
    if (tab === before.tab) return;
    for (const other of all) {
      const chosen = other.id === `tab-${tab}`;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
    }
  });
}
