// The few helpers that every part of the page uses. Text enters the page through textContent only.

export const byId = (id) => document.getElementById(id);

/** A copy of the element in a <template>. */
export const fromTemplate = (id) => byId(id).content.firstElementChild.cloneNode(true);

/** The element below `root` that is marked data-part="name". */
export const part = (root, name) => root.querySelector(`[data-part="${name}"]`);

/** Shows a text, or hides its element if there is none. */
export function showText(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

/** Says something to screen readers that the eye sees anyway. */
export function announce(text) {
  byId("status").textContent = text;
}

/** Hands a file to the user. */
export function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  // The browser reads the address a little later.
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
