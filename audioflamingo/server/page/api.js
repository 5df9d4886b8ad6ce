// The HTTP interface of the server, as any other client uses it. Nothing else in the page talks to it.

import { ApiError, toApiError } from "./errors.js";

const KEY = "audioflamingo-api-key"; // in sessionStorage: gone when the tab is closed

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  // Relative, so that the page also works below a path of a proxy.
  const response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  if (!response.ok) throw await toApiError(response);
  return response;
}

/** Names of the models. */
export async function listModels() {
  const content = await (await request("v1/models")).json();
  return content.data.map((model) => model.id);
}

/** The answer to a conversation: events as they come. */
export async function* chat(model, messages, signal) {
  const body = JSON.stringify({ model, messages, stream: true });
  const headers = { "Content-Type": "application/json" };
  yield* readEvents(await request("v1/chat/completions", { method: "POST", headers, body, signal }));
}

/** The transcript of a file: events as they come. */
export async function* transcribe(model, file, name, signal) {
  const body = transcriptionForm(file, name, { model, stream: "true" });
  yield* readEvents(await request("v1/audio/transcriptions", { method: "POST", body, signal }));
}

/** The transcript of a file in one piece, with the times of its segments. */
export async function transcribeWhole(model, file, name, signal) {
  const body = transcriptionForm(file, name, { model, response_format: "verbose_json" });
  return (await request("v1/audio/transcriptions", { method: "POST", body, signal })).json();
}

/** A websocket for live speech; see `LivePanel` for what is said there. */
export function openLive(model) {
  const url = new URL(`v1/realtime?intent=transcription&model=${encodeURIComponent(model)}`, document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  const key = sessionStorage.getItem(KEY);
  // A page cannot send headers with a websocket.
  return new WebSocket(url, ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])]);
}

function transcriptionForm(file, name, fields) {
  const form = new FormData();
  form.append("file", file, name);
  for (const [field, value] of Object.entries(fields)) form.append(field, value);
  return form;
}

/** The objects of a stream of server-sent events, up to `[DONE]`. */
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("the connection ended before the answer did; try again.");
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue; // a sign of life
        const data = block.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}
