// What went wrong, in words for people, and the way on.

import { fromTemplate } from "./dom.js";

/** An error that the server told us about. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfterS = null) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** The error of a reply that is none of the good ones. */
export async function toApiError(response) {
  const content = await response.json().catch(() => null); // a proxy between us may answer in HTML
  const message = content?.error?.message ?? `the server answered with status ${response.status}.`;
  const retryAfterS = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(message, response.status, retryAfterS);
}

export const isStop = (error) => error.name === "AbortError";

/** One or two sentences about an error. */
export function describe(error) {
  if (error.status === 401) return "The server needs its API key. Enter it at the top of the page.";
  if (error.status === 429) return `The server is busy. ${whenToTry(error.retryAfterS)}`;
  if (error instanceof ApiError) return sentence(error.message);
  if (error instanceof TypeError) return "The server cannot be reached. Check that it is running, then try again.";
  return sentence(error.message);
}

function whenToTry(seconds) {
  if (seconds === null) return "Try again in a moment.";
  return `Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.`;
}

function sentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}

/** Shows an error in `slot`, with a button where trying again can help. */
export function showNotice(slot, text, retry = null) {
  const notice = fromTemplate("notice-template");
  notice.querySelector("p").textContent = text;
  const button = notice.querySelector("button");
  button.hidden = retry === null;
  button.addEventListener("click", () => {
    slot.replaceChildren();
    retry();
  });
  slot.replaceChildren(notice);
}
