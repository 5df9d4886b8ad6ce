// The picture of a clip: waveform, spectrogram, time axis and the place where it plays. It is a slider: a click
// or the arrow keys seek.

import { clock } from "./formats.js";
import { logMel, peaks } from "./spectrogram.js";
import { part } from "./dom.js";
import { RATE } from "./audio.js";

const STEPS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600];
const LABEL_PX = 56; // room for a label of the axis
// From silence to loud, for light and dark pages. Red, green, blue.
const LIGHT = [[255, 255, 255], [253, 228, 221], [243, 150, 146], [196, 58, 112], [92, 28, 92], [28, 14, 44]];
const DARK = [[24, 20, 32], [58, 28, 78], [134, 40, 102], [224, 82, 108], [255, 178, 138], [255, 244, 226]];

export class Timeline {
  /** `root` is the slider; `onSeek(seconds)` is called when the user picks a place, `onToggle()` for the space bar. */
  constructor(root, onSeek, onToggle) {
    this.root = root;
    this.onSeek = onSeek;
    this.duration = 0;
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.redraw = () => this.draw();
    this.dark.addEventListener("change", this.redraw);
    new ResizeObserver(this.redraw).observe(root);
    root.addEventListener("pointerdown", (event) => this.drag(event));
    root.addEventListener("pointermove", (event) => event.buttons && this.drag(event));
    root.addEventListener("keydown", (event) => {
      if (event.key === " ") onToggle();
      else if (!this.step(event)) return;
      event.preventDefault();
    });
  }

  /** Shows a waveform (mono, RATE). */
  show(samples, name) {
    this.duration = samples.length / RATE;
    this.peaks = peaks(samples);
    this.mel = logMel(samples);
    this.root.setAttribute("aria-label", `Position in ${name}`);
    this.root.setAttribute("aria-valuemax", this.duration.toFixed(1));
    this.root.hidden = false;
    this.moveTo(0);
    this.draw();
  }

  moveTo(seconds) {
    const place = Math.min(1, seconds / this.duration);
    part(this.root, "playhead").style.transform = `translateX(${place * this.root.clientWidth}px)`;
    this.root.setAttribute("aria-valuenow", seconds.toFixed(1));
    this.root.setAttribute("aria-valuetext", `${clock(seconds)} of ${clock(this.duration)}`);
  }

  remove() {
    this.dark.removeEventListener("change", this.redraw);
  }

  drag(event) {
    const place = event.offsetX / this.root.clientWidth;
    this.onSeek(Math.max(0, Math.min(1, place)) * this.duration);
  }

  step(event) {
    const now = Number(this.root.getAttribute("aria-valuenow"));
    const step = event.shiftKey ? 10 : 1;
    const places = {
      ArrowLeft: now - step,
      ArrowDown: now - step,
      ArrowRight: now + step,
      ArrowUp: now + step,
      Home: 0,
      End: this.duration,
    };
    if (!(event.key in places)) return false;
    this.onSeek(Math.max(0, Math.min(this.duration, places[event.key])));
    return true;
  }

  draw() {
    if (this.root.hidden || !this.mel) return;
    const style = getComputedStyle(this.root);
    this.drawWaveform(fit(part(this.root, "waveform")), style.getPropertyValue("--accent"));
    this.drawSpectrogram(fit(part(this.root, "spectrogram")), this.dark.matches ? DARK : LIGHT);
    this.drawAxis(fit(part(this.root, "axis")), style);
    this.moveTo(Number(this.root.getAttribute("aria-valuenow")));
  }

  drawWaveform(canvas, colour) {
    const context = canvas.getContext("2d");
    const columns = this.peaks.length / 2;
    const loudest = Math.max(1e-3, ...this.peaks.map(Math.abs));
    const y = (value) => (canvas.height / 2) * (1 - (0.95 * value) / loudest);
    context.fillStyle = colour;
    for (let x = 0; x < canvas.width; x++) {
      const first = Math.floor((x * columns) / canvas.width);
      const last = Math.max(first + 1, Math.floor(((x + 1) * columns) / canvas.width));
      const here = this.peaks.subarray(2 * first, 2 * last);
      const [top, bottom] = [Math.max(...here), Math.min(...here)];
      context.fillRect(x, y(top) - 0.5, 1, y(bottom) - y(top) + 1); // silence is a line
    }
  }

  drawSpectrogram(canvas, colours) {
    const { columns, bands, values } = this.mel;
    const picture = new ImageData(columns, bands);
    values.forEach((value, i) => {
      const [column, band] = [Math.floor(i / bands), i % bands];
      picture.data.set(mix(colours, value), 4 * ((bands - 1 - band) * columns + column)); // low bands at the bottom
    });
    const small = new OffscreenCanvas(columns, bands);
    small.getContext("2d").putImageData(picture, 0, 0);
    canvas.getContext("2d").drawImage(small, 0, 0, canvas.width, canvas.height);
  }

  drawAxis(canvas, style) {
    const context = canvas.getContext("2d");
    const scale = canvas.width / canvas.clientWidth;
    const most = canvas.clientWidth / LABEL_PX;
    const step = STEPS_S.find((seconds) => this.duration / seconds <= most) ?? STEPS_S.at(-1);
    context.scale(scale, scale);
    context.fillStyle = style.getPropertyValue("--muted");
    context.font = `11px ${style.fontFamily}`;
    context.textBaseline = "bottom";
    for (let i = 0; i * step < this.duration; i++) {
      const x = (i * step * canvas.clientWidth) / this.duration;
      const label = step < 1 ? `${(i * step).toFixed(1)} s` : clock(i * step);
      if (x + 3 + context.measureText(label).width > canvas.clientWidth) break;
      context.fillRect(x, 0, 1, 4);
      context.fillText(label, x + 3, canvas.clientHeight);
    }
  }
}

/** Gives a canvas as many pixels as it covers on the screen; empties it. */
function fit(canvas) {
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
  return canvas;
}

/** The colour at 0 .. 1 of a row of colours: red, green, blue, opacity. */
function mix(colours, value) {
  const place = value * (colours.length - 1);
  const i = Math.min(colours.length - 2, Math.floor(place));
  return [...colours[i].map((c, k) => c + (place - i) * (colours[i + 1][k] - c)), 255];
}
