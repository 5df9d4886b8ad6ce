// Times and transcripts as text. The subtitles are those of `af3 transcribe --format srt`.

const oneLine = (text) => text.split(/[\s\x1c-\x1f\x85]+/).filter(Boolean).join(" ");
const spoken = (segments) => segments.filter((segment) => segment.text.trim());

/** 75.4 -> "1:15"; with hours where there are some. */
export function clock(seconds) {
  const total = Math.floor(seconds);
  const [h, m, s] = [Math.floor(total / 3600), Math.floor(total / 60) % 60, String(total % 60).padStart(2, "0")];
  return h ? `${h}:${String(m).padStart(2, "0")}:${s}` : `${m}:${s}`;
}

/** 75.4 -> "00:01:15,400" */
function stamp(seconds) {
  const total = Math.round(seconds * 1000);
  const two = (number) => String(Math.floor(number)).padStart(2, "0");
  const ms = String(total % 1000).padStart(3, "0");
  return `${two(total / 3_600_000)}:${two((total / 60_000) % 60)}:${two((total / 1000) % 60)},${ms}`;
}

function toSrt({ segments }) {
  // An arrow in the text would be read as times.
  const cue = ({ start, end, text }, i) =>
    `${i + 1}\n${stamp(start)} --> ${stamp(end)}\n${oneLine(text).replaceAll("-->", "->")}\n\n`;
  return spoken(segments).map(cue).join("");
}

const toTxt = ({ segments }) => spoken(segments).map(({ text }) => `${oneLine(text)}\n`).join("");
const toJson = (transcript) => `${JSON.stringify(transcript, null, 2)}\n`;

/** Each way to download a transcript {source, text, segments}. */
export const FORMATS = {
  txt: { type: "text/plain", write: toTxt },
  srt: { type: "application/x-subrip", write: toSrt },
  json: { type: "application/json", write: toJson },
};
