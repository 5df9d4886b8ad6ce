// Wires the parts of the page together.

import { hasKey, listModels, setKey } from "./api.js";
import { Clips } from "./clips.js";
import { Conversation } from "./conversation.js";
import { LivePanel } from "./live.js";
import { byId, showText } from "./dom.js";
import { describe, showNotice } from "./errors.js";

const models = byId("model");
const question = byId("question");
let refused = []; // what to do again once there is a key

/** Promises the name of the chosen model; asks the server for its models if that has not worked yet. */
async function getModel() {
  if (!models.value) {
    models.replaceChildren(...(await listModels()).map((name) => new Option(name, name)));
    models.disabled = models.length < 2;
  }
  return models.value;
}

/** Takes refusals for want of a key over: asks for it; `retry` runs when there is one. */
function onRefused(error, retry) {
  if (error.status !== 401) return false;
  byId("key-label").textContent = hasKey() ? "That key was not accepted." : "This server asks for an API key.";
  byId("key-form").hidden = false;
  byId("key").focus();
  if (retry !== connect) refused.push(retry);
  return true;
}

async function connect() {
  try {
    await getModel();
    byId("key-form").hidden = true;
  } catch (error) {
    if (!onRefused(error, connect)) showNotice(byId("server-notice"), describe(error), connect);
  }
}

const conversation = new Conversation({ getClips: () => clips.list, getModel, onRefused, onChange: update });
const clips = new Clips({ getModel, onRefused }, update);
new LivePanel({ getModel, onRefused });

/** Shows what can be done now. */
function update() {
  const isRunning = conversation.running !== null;
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  if (hadFocus) question.focus();
  byId("welcome").hidden = conversation.turns.length > 0;
  const names = isRunning ? [] : conversation.newClips.map((clip) => clip.name);
  showText(byId("attached"), names.length ? `Goes with your question: ${names.join(", ")}` : "");
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  byId("key").value = "";
  await connect();
  if (!byId("key-form").hidden) return;
  question.focus();
  const retries = refused;
  refused = [];
  retries.forEach((retry) => retry());
});

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || conversation.running) return;
  question.value = "";
  conversation.ask(text);
});

question.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !conversation.stop()) clips.stop();
});

byId("stop").addEventListener("click", () => conversation.stop());
byId("new-conversation").addEventListener("click", () => {
  conversation.clear();
  question.focus();
});

byId("suggestions").addEventListener("click", (event) => {
  if (event.target.tagName !== "BUTTON") return;
  question.value = event.target.textContent;
  question.focus();
});

connect();
