// One clip: its file, its card on the page, its player and its transcript.

import { decode, isLarge, toBase64, toUpload } from "./audio.js";
import { fromTemplate, part, showText } from "./dom.js";
import { clock } from "./formats.js";
import { Timeline } from "./timeline.js";
import { Transcript } from "./transcript.js";

const MAX_PICTURE_S = 3600; // decoded audio takes 230 MB an hour

export class Clip {
  /** `services` are those of `Transcript`; `onRemove(clip)` is called when the user removes it. */
  constructor(file, services, onRemove) {
    this.name = file.name;
    this.upload = file;
    this.root = fromTemplate("clip-template");
    this.url = URL.createObjectURL(file);
    this.player = part(this.root, "audio");
    this.timeline = new Timeline(part(this.root, "timeline"), (s) => this.seek(s), () => this.toggle());
    this.transcript = new Transcript(this.root, this, { ...services, play: (s) => this.play(s) });
    this.listen(onRemove);
    this.ready = this.load(file);
  }

  listen(onRemove) {
    part(this.root, "name").textContent = this.name;
    part(this.root, "remove").setAttribute("aria-label", `Remove ${this.name}`);
    part(this.root, "remove").addEventListener("click", () => onRemove(this));
    part(this.root, "play").addEventListener("click", () => this.toggle());
    this.root.addEventListener("keydown", (event) => {
      // Escape stops what is nearest to the keyboard.
      if (event.key === "Escape" && this.transcript.stop()) event.stopPropagation();
    });
    for (const name of ["play", "pause", "ended"]) this.player.addEventListener(name, () => this.follow());
    this.player.addEventListener("seeked", () => this.showPlace());
  }

  async load(file) {
    const duration = await this.openPlayer();
    if (duration === null) {
      showText(part(this.root, "note"), "This browser cannot play the file; the server may still understand it.");
      return;
    }
    part(this.root, "duration").textContent = clock(duration);
    part(this.root, "play").hidden = part(this.root, "time").hidden = false;
    if (duration > MAX_PICTURE_S) {
      showText(part(this.root, "note"), "Too long for a picture; everything else works.");
      return;
    }
    showText(part(this.root, "note"), "Drawing …");
    try {
      const samples = await decode(file);
      this.upload = toUpload(file, samples);
      this.timeline.show(samples, this.name);
      this.showPlace();
      showText(part(this.root, "note"), "");
    } catch {
      showText(part(this.root, "note"), "This browser cannot draw the file; everything else works.");
    }
  }

  /** Promises what goes to the server. */
  async getUpload() {
    if (isLarge(this.upload)) await this.ready; // there may be something smaller then
    return this.upload;
  }

  /** Promises the seconds of the clip; null if the browser cannot play it. */
  openPlayer() {
    return new Promise((resolve) => {
      this.player.addEventListener("loadedmetadata", () => resolve(this.player.duration), { once: true });
      this.player.addEventListener("error", () => resolve(null), { once: true });
      this.player.src = this.url;
    });
  }

  /** Promises the clip as a part of a message. */
  async toPart() {
    const upload = await this.getUpload();
    this.base64 ??= toBase64(upload);
    const format = upload.type === "audio/wav" ? "wav" : this.name.split(".").pop().toLowerCase();
    return { type: "input_audio", input_audio: { data: await this.base64, format } };
  }

  seek(seconds) {
    this.player.currentTime = seconds;
    this.showPlace();
  }

  toggle() {
    if (this.player.paused) this.play(this.player.currentTime);
    else this.player.pause();
  }

  async play(seconds) {
    for (const other of document.querySelectorAll("audio")) other !== this.player && other.pause();
    this.seek(seconds);
    await this.player.play().catch(() => {}); // paused or removed before it began
  }

  /** Follows the player as long as it plays. */
  follow() {
    part(this.root, "play").textContent = this.player.paused ? "Play" : "Pause";
    this.showPlace();
    if (!this.player.paused) requestAnimationFrame(() => this.follow());
  }

  showPlace() {
    const now = this.player.currentTime;
    part(this.root, "time").textContent = `${clock(now)} / ${clock(this.player.duration)}`;
    if (this.timeline.duration) this.timeline.moveTo(now);
    this.transcript.markAt(now);
  }

  remove() {
    this.transcript.stop();
    this.timeline.remove();
    this.player.pause();
    URL.revokeObjectURL(this.url);
    this.root.remove();
  }
}
