// The list of clips, and the three ways into it: choosing, dropping and recording.

import { Recording } from "./audio.js";
import { Clip } from "./clip.js";
import { announce, byId } from "./dom.js";
import { clock } from "./formats.js";
import { describe, showNotice } from "./errors.js";

export class Clips {
  /** `services` are those of `Transcript`; `onChange()` is called when the list changes. */
  constructor(services, onChange) {
    Object.assign(this, { services, onChange, list: [], recording: null, numRecordings: 0 });
    const files = byId("files");
    byId("choose").addEventListener("click", () => files.click());
    files.addEventListener("change", () => {
      this.add(files.files);
      files.value = ""; // so that the same file can be chosen again
    });
    byId("record").addEventListener("click", () => this.toggleRecording());
    this.acceptDrops();
  }

  acceptDrops() {
    const zone = byId("drop-zone");
    document.addEventListener("dragover", (event) => {
      event.preventDefault(); // or the browser would leave the page and open the file
      zone.classList.add("over");
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) zone.classList.remove("over");
    });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      zone.classList.remove("over");
      this.add(event.dataTransfer.files);
    });
  }

  add(files) {
    byId("clips-notice").replaceChildren();
    for (const file of files) {
      const clip = new Clip(file, this.services, (removed) => this.remove(removed));
      this.list.push(clip);
      byId("clip-list").append(clip.root);
      announce(`${file.name} added.`);
    }
    this.onChange();
  }

  remove(clip) {
    clip.remove();
    this.list = this.list.filter((other) => other !== clip);
    announce(`${clip.name} removed.`);
    byId("choose").focus();
    this.onChange();
  }

  /** Stops every transcription. */
  stop() {
    this.list.forEach((clip) => clip.transcript.stop());
  }

  async toggleRecording() {
    const button = byId("record");
    button.disabled = true; // until the microphone is open or the recording is read
    try {
      if (this.recording) this.add([await this.endRecording()]);
      else this.recording = await Recording.start();
    } catch (error) {
      showNotice(byId("clips-notice"), describe(error));
    }
    button.disabled = false;
    button.focus();
    button.classList.toggle("on", this.recording !== null);
    this.showRecordingTime();
  }

  endRecording() {
    const { recording } = this;
    this.recording = null;
    this.numRecordings += 1;
    return recording.stop(`recording-${this.numRecordings}.wav`);
  }

  showRecordingTime() {
    const label = byId("record").lastElementChild;
    label.textContent = this.recording ? `Stop recording, ${clock(this.recording.seconds)}` : "Record";
    if (this.recording) setTimeout(() => this.showRecordingTime(), 500);
  }
}
