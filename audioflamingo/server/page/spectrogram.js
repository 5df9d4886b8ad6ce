// A picture of sound: log-mel energies, close to what the model is given (25 ms Hann windows, 80 dB of range).

import { RATE } from "./audio.js";

const WINDOW = 400; // samples, 25 ms
const FFT = 512;
const BANDS = 80;
const MAX_COLUMNS = 1200;
const FRAMES_PER_COLUMN = 4; // at most: of long audio a column shows a sample of its frames
const RANGE = 8; // powers of ten below the loudest

const HANN = Float32Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
const COS = Float32Array.from({ length: FFT / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / FFT));
const SIN = Float32Array.from({ length: FFT / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / FFT));
const toMel = (hz) => 2595 * Math.log10(1 + hz / 700);
const toHz = (mel) => 700 * (10 ** (mel / 2595) - 1);
const FILTERS = makeFilters();

/** Triangles in mel: for each band the first bin and the weights from there on. */
function makeFilters() {
  const edge = (i) => (toHz((toMel(RATE / 2) * i) / (BANDS + 1)) * FFT) / RATE;
  return Array.from({ length: BANDS }, (_, band) => {
    const [low, peak, high] = [edge(band), edge(band + 1), edge(band + 2)];
    // The lowest triangles are narrower than a bin: each band has the bin next to its peak at least.
    const first = Math.min(Math.ceil(low), Math.round(peak));
    const last = Math.max(Math.floor(high), Math.round(peak));
    const weights = [];
    for (let bin = first; bin <= last; bin++) {
      weights.push(Math.max(0.1, Math.min((bin - low) / (peak - low), (high - bin) / (high - peak))));
    }
    return { first, weights };
  });
}

/** In-place radix-2 FFT of FFT complex numbers. */
function transform(re, im) {
  for (let i = 1, j = 0; i < FFT; i++) {
    let bit = FFT >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let size = 2; size <= FFT; size *= 2) {
    for (let k = 0; k < size / 2; k++) {
      const c = COS[(k * FFT) / size];
      const s = SIN[(k * FFT) / size];
      for (let a = k; a < FFT; a += size) {
        const b = a + size / 2;
        const x = re[b] * c - im[b] * s;
        const y = re[b] * s + im[b] * c;
        re[b] = re[a] - x;
        im[b] = im[a] - y;
        re[a] += x;
        im[a] += y;
      }
    }
  }
}

/** Adds the mel energies of the window around sample `centre` to `energies`. */
function addFrame(samples, centre, energies) {
  const re = new Float32Array(FFT);
  const im = new Float32Array(FFT);
  const start = Math.round(centre - WINDOW / 2);
  for (let i = 0; i < WINDOW; i++) re[i] = (samples[start + i] ?? 0) * HANN[i];
  transform(re, im);
  FILTERS.forEach(({ first, weights }, band) => {
    weights.forEach((weight, i) => {
      energies[band] += weight * (re[first + i] ** 2 + im[first + i] ** 2);
    });
  });
}

/** Brightness 0 .. 1 of each band of each column: {columns, bands, values[column * bands + band]}. */
export function logMel(samples) {
  const hop = WINDOW / 2;
  const frames = Math.max(1, Math.ceil(samples.length / hop));
  const columns = Math.min(MAX_COLUMNS, frames);
  const perColumn = Math.min(FRAMES_PER_COLUMN, Math.round(frames / columns));
  const values = new Float32Array(columns * BANDS);
  for (let column = 0; column < columns; column++) {
    const energies = values.subarray(column * BANDS, (column + 1) * BANDS);
    for (let frame = 0; frame < perColumn; frame++) {
      addFrame(samples, ((column + (frame + 0.5) / perColumn) * samples.length) / columns, energies);
    }
  }
  let loudest = -10;
  values.forEach((value, i) => {
    values[i] = Math.log10(Math.max(value / perColumn, 1e-10));
    loudest = Math.max(loudest, values[i]);
  });
  return { columns, bands: BANDS, values: values.map((value) => Math.max(0, 1 + (value - loudest) / RANGE)) };
}

/** Lowest and highest sample of each of `columns` stretches: [low, high, low, high ...]. */
export function peaks(samples, columns = MAX_COLUMNS) {
  const found = new Float32Array(2 * columns);
  for (let column = 0; column < columns; column++) {
    const start = Math.floor((column * samples.length) / columns);
    const end = Math.max(start + 1, Math.floor(((column + 1) * samples.length) / columns));
    for (let i = start; i < end && i < samples.length; i++) {
      found[2 * column] = Math.min(found[2 * column], samples[i]);
      found[2 * column + 1] = Math.max(found[2 * column + 1], samples[i]);
    }
  }
  return found;
}
