// Live speech: the microphone to the server's websocket; words as they are spoken, a segment at each pause.

import { openLive } from "./api.js";
import { LiveMicrophone, toPcm } from "./audio.js";
import { announce, byId, showText } from "./dom.js";
import { ApiError, describe, showNotice } from "./errors.js";
import { clock } from "./formats.js";

const RATE = 24000; // Hz, what the interface takes
const ITEM = "conversation.item.input_audio_transcription";

export class LivePanel {
  /** `services` are those of `Transcript`. */
  constructor({ getModel, onRefused }) {
    Object.assign(this, { getModel, onRefused, socket: null, microphone: null, isEnding: false });
    this.items = new Map(); // that are not told to their end: by id, when they began and their words so far
    byId("live").addEventListener("click", () => (this.socket ? this.end() : this.start()));
  }

  async start() {
    byId("live").disabled = true;
    byId("live-panel").hidden = false;
    byId("live-notice").replaceChildren();
    this.items.clear();
    this.isEnding = false;
    try {
      this.socket = await this.open(await this.getModel());
      this.microphone = await LiveMicrophone.start(RATE, (samples) => {
        this.send("input_audio_buffer.append", { audio: toPcm(samples) });
      });
      announce("Listening.");
    } catch (error) {
      this.stop();
      if (!this.onRefused(error, () => this.start())) showNotice(byId("live-notice"), describe(error));
    }
    this.show();
  }

  /** Promises an open socket. */
  open(model) {
    return new Promise((resolve, reject) => {
      const socket = openLive(model);
      socket.onopen = () => resolve(socket);
      socket.onmessage = (message) => this.take(JSON.parse(message.data));
      socket.onclose = () => {
        reject(new ApiError("the server did not open a live session; it may be full, or too old. Try again."));
        if (this.socket !== socket) return; // we closed it
        this.stop();
        showNotice(byId("live-notice"), "The live session ended.", () => this.start());
      };
    });
  }

  send(type, content = {}) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...content }));
  }

  take(event) {
    if (event.type === "input_audio_buffer.speech_started") {
      this.items.set(event.item_id, { start: event.audio_start_ms / 1000, text: "" });
    } else if (event.type === `${ITEM}.delta`) {
      this.items.get(event.item_id).text += event.delta;
    } else if (event.type === `${ITEM}.completed`) {
      this.add(this.items.get(event.item_id).start, event.transcript);
      this.items.delete(event.item_id);
    } else if (event.type === `${ITEM}.failed`) {
      this.items.delete(event.item_id);
      showNotice(byId("live-notice"), describe(new ApiError(event.error.message)));
    } else if (event.type === "error" && event.error.code !== "input_audio_buffer_commit_empty") {
      showNotice(byId("live-notice"), describe(new ApiError(event.error.message)));
    }
    const isTold = event.type === "error" || event.type.startsWith(ITEM);
    if (this.isEnding && isTold && !this.items.size) this.stop();
    this.show();
  }

  add(start, text) {
    if (!text) return;
    const item = document.createElement("li");
    const time = document.createElement("time");
    time.textContent = clock(start);
    item.append(time, " ", text);
    byId("live-segments").append(item);
  }

  /** Stops hearing; what was said is still told. */
  end() {
    this.isEnding = true;
    this.microphone?.stop();
    this.microphone = null;
    this.send("input_audio_buffer.commit");
    this.show();
  }

  stop() {
    const { socket, microphone } = this;
    this.socket = this.microphone = null;
    microphone?.stop();
    socket?.close();
    this.items.clear();
    this.show();
  }

  show() {
    const isOn = this.socket !== null;
    byId("live").disabled = isOn && this.isEnding;
    byId("live").classList.toggle("on", isOn);
    byId("live").lastElementChild.textContent = isOn ? "Stop listening" : "Listen live";
    const words = [...this.items.values()].map(({ text }) => text).join(" ").trim();
    showText(byId("live-partial"), words || (isOn ? "Listening …" : ""));
  }
}
