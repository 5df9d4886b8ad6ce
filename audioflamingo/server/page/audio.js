// Files -> waveforms, for the picture and for what has to be sent in another form.

import { encodeWav } from "./wav.js";

export const RATE = 16000; // Hz, what the model hears
const LARGE_BYTES = 8_000_000;

/** Mono samples at RATE. Throws if the browser cannot decode the file. */
export async function decode(blob) {
  const context = new OfflineAudioContext(1, 1, RATE); // decoding resamples to the rate of its context
  const buffer = await context.decodeAudioData(await blob.arrayBuffer());
  const samples = buffer.getChannelData(0).slice();
  for (let c = 1; c < buffer.numberOfChannels; c++) {
    buffer.getChannelData(c).forEach((value, i) => (samples[i] += value));
  }
  return samples.map((value) => value / buffer.numberOfChannels);
}

export const isLarge = (file) => file.size >= LARGE_BYTES;

/**
 * What goes to the server. It decodes more kinds than the browser and resamples better, so files go as they are;
 * only a large one is sent as 16 kHz mono where that is smaller.
 */
export function toUpload(file, samples) {
  if (!isLarge(file)) return file;
  const wav = encodeWav(samples, RATE);
  return wav.size < file.size ? wav : file;
}

/** Base64 of a file, without the `data:` in front. */
export function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("the file can no longer be read; add it again."));
    reader.readAsDataURL(blob);
  });
}

/** Base64 of samples as 16-bit little-endian. */
export function toPcm(samples) {
  const bytes = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((value, i) => bytes.setInt16(2 * i, Math.max(-1, Math.min(1, value)) * 32767, true));
  return btoa(Array.from(new Uint8Array(bytes.buffer), (byte) => String.fromCharCode(byte)).join(""));
}

async function openMicrophone() {
  // Browsers offer the microphone to https and localhost only.
  if (!navigator.mediaDevices) throw new Error("recording needs https, or the page on localhost.");
  return navigator.mediaDevices.getUserMedia({ audio: true }).catch((error) => {
    throw new Error(`the microphone cannot be used (${error.message}).`);
  });
}

/** Hears the microphone until `stop`; each tenth of a second goes to `onSamples`, mono at `rate`. */
export class LiveMicrophone {
  static async start(rate, onSamples) {
    const microphone = new LiveMicrophone();
    microphone.stream = await openMicrophone();
    microphone.context = new AudioContext({ sampleRate: rate });
    await microphone.context.audioWorklet.addModule(new URL("capture.js", document.baseURI));
    const node = new AudioWorkletNode(microphone.context, "capture", { numberOfOutputs: 0 });
    node.port.onmessage = (event) => onSamples(event.data);
    microphone.context.createMediaStreamSource(microphone.stream).connect(node);
    return microphone;
  }

  stop() {
    this.stream.getTracks().forEach((track) => track.stop());
    return this.context.close();
  }
}

/** Records from the microphone until `stop`. */
export class Recording {
  static async start() {
    return new Recording(await openMicrophone());
  }

  constructor(stream) {
    this.startedAt = performance.now();
    this.stream = stream;
    this.pieces = [];
    this.recorder = new MediaRecorder(stream);
    this.recorder.ondataavailable = (event) => this.pieces.push(event.data);
    this.recorder.start();
  }

  get seconds() {
    return (performance.now() - this.startedAt) / 1000;
  }

  /** A WAV file: what browsers record (webm, mp4) holds no duration and differs between them. */
  async stop(name) {
    await new Promise((resolve) => {
      this.recorder.onstop = resolve;
      this.recorder.stop();
    });
    this.stream.getTracks().forEach((track) => track.stop());
    const samples = await decode(new Blob(this.pieces, { type: this.recorder.mimeType }));
    return new File([encodeWav(samples, RATE)], name, { type: "audio/wav" });
  }
}
