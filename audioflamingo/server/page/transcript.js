// The transcript of one clip: segments as they come, each a button that plays it, and files to download.

import { transcribe, transcribeWhole } from "./api.js";
import { announce, download, fromTemplate, part, showText } from "./dom.js";
import { describe, isStop, showNotice } from "./errors.js";
import { clock, FORMATS } from "./formats.js";

export class Transcript {
  /**
   * `root` is the clip's element, `clip` has `getUpload()`, which promises a file, and `name`, `play(seconds)` plays from there,
   * `getModel()` promises the model's name and `onRefused(error, retry)` may take an error over.
   */
  constructor(root, clip, { play, getModel, onRefused }) {
    Object.assign(this, { root, clip, play, getModel, onRefused, segments: [], running: null });
    part(root, "transcribe").addEventListener("click", () => this.run());
    part(root, "stop").addEventListener("click", () => this.stop());
    for (const button of root.querySelectorAll("[data-format]")) {
      button.addEventListener("click", () => this.save(button.dataset.format));
    }
  }

  /** Stops what runs; false if nothing does. */
  stop() {
    this.running?.abort();
    return this.running !== null;
  }

  async run() {
    this.running = new AbortController();
    this.start();
    try {
      await this.read(this.running.signal);
      announce(`Transcript of ${this.clip.name} complete.`);
      if (!this.segments.length) showNotice(part(this.root, "notice"), "No speech was found in this clip.");
    } catch (error) {
      if (isStop(error)) announce("Stopped.");
      else if (!this.onRefused(error, () => this.run())) {
        showNotice(part(this.root, "notice"), describe(error), () => this.run());
      }
    } finally {
      this.finish();
    }
  }

  async read(signal) {
    const request = [await this.getModel(), await this.clip.getUpload(), this.clip.name, signal];
    let words = "";
    for await (const event of transcribe(...request)) {
      if (event.type === "transcript.text.delta") words += event.delta;
      if (event.type === "transcript.text.segment") this.add(event);
      showText(part(this.root, "partial"), this.segments.length ? "" : words.trim());
    }
    if (this.segments.length || !words) return;
    // A server that streams words alone has the times in its whole transcript.
    (await transcribeWhole(...request)).segments.forEach((segment) => this.add(segment));
  }

  add({ start, end, text }) {
    const segment = { id: this.segments.length, start, end, text: text.trim() };
    this.segments.push(segment);
    if (!segment.text) return;
    const item = fromTemplate("segment-template");
    item.querySelector("time").textContent = clock(start);
    item.querySelector("span").textContent = segment.text;
    item.querySelector("button").addEventListener("click", () => this.play(start));
    segment.element = item.querySelector("button");
    part(this.root, "segments").append(item);
  }

  /** Marks the segment that is heard. */
  markAt(seconds) {
    for (const { start, end, element } of this.segments) {
      if (seconds >= start && seconds < end) element?.setAttribute("aria-current", "true");
      else element?.removeAttribute("aria-current");
    }
  }

  save(format) {
    const segments = this.segments.map(({ id, start, end, text }) => ({ id, start, end, text }));
    const text = segments.map((segment) => segment.text).filter(Boolean).join(" ");
    const { type, write } = FORMATS[format];
    const name = this.clip.name.replace(/\.[^.]*$/, "");
    download(`${name}.${format}`, type, write({ source: this.clip.name, text, segments }));
  }

  start() {
    this.segments = [];
    part(this.root, "segments").replaceChildren();
    part(this.root, "notice").replaceChildren();
    part(this.root, "transcript").hidden = false;
    part(this.root, "downloads").hidden = true;
    showText(part(this.root, "partial"), "Listening …");
    this.swap("transcribe", "stop");
  }

  finish() {
    this.running = null;
    showText(part(this.root, "partial"), "");
    part(this.root, "downloads").hidden = !this.segments.some((segment) => segment.text);
    this.swap("stop", "transcribe");
  }

  /** Shows one button in place of another and keeps the keyboard where it was. */
  swap(from, to) {
    const hadFocus = document.activeElement === part(this.root, from);
    part(this.root, from).hidden = true;
    part(this.root, to).hidden = false;
    if (hadFocus) part(this.root, to).focus();
  }
}
