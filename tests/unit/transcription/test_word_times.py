"""Words and their times: the attention that is looked at, the path through it, and subtitles cut at words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo.engine.audio_cache import ClipCache
from audioflamingo.errors import AudioFlamingoWarning
from audioflamingo.network.audio_attention import audio_attention
from audioflamingo.processor import AudioFlamingo3Processor
from audioflamingo.transcription import TranscriptionOptions, format_transcript
from audioflamingo.transcription.alignment_heads import (
    AlignmentHeads,
    choose_heads,
    keep_heads,
    known_heads,
    path_shares,
)
from audioflamingo.transcription.segments import Segment, Word
from audioflamingo.transcription.windows import Window
from audioflamingo.transcription.word_times import WordTimer, best_path, trim, word_spans
from audioflamingo.transcription.writers import subtitle_cues
from tests.support.audio_files import tone
from tests.support.scripted_model import framed, tiny_processor
from tests.support.tiny_model import AUDIO_TOKEN_ID, make_batch, tiny_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return tiny_processor(tmp_path_factory.mktemp("processor"))


@torch.no_grad()
def test_what_is_looked_at_is_the_networks_attention() -> None:
    """Over the audio alone: the eager weights, scaled to sum to 1 there."""
    model = tiny_model()
    batch = make_batch([([300], 9)])
    ids = batch["input_ids"][0]
    places = (ids == AUDIO_TOKEN_ID).nonzero()[:, 0]
    audio = slice(int(places[0]), int(places[-1]) + 1)
    model.set_attn_implementation("eager")
    expected = model(**batch, output_attentions=True).attentions
    x = model.embed(ids)
    x[audio] = model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output
    model.set_attn_implementation("sdpa")
    first = audio.stop + 2
    found = dict(audio_attention(model.model.language_model, x, audio, first, {0, 1}))
    assert found.keys() == {0, 1}
    for layer, weights in found.items():
        wanted = expected[layer][0, :, first:, audio]
        torch.testing.assert_close(weights, wanted / wanted.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def matrix(frames: list[int], num_frames: int, sharpness: float = 0.9) -> np.ndarray:
    """Each token looks at its frame, and a little everywhere."""
    weights = np.full((len(frames), num_frames), (1 - sharpness) / num_frames)
    weights[np.arange(len(frames)), frames] += sharpness
    return weights


def test_the_head_that_goes_forward_is_found() -> None:
    forward, backward = matrix([3, 10, 20, 30], 40), matrix([30, 20, 10, 3], 40)
    flat = np.full((4, 40), 1 / 40)
    shares = path_shares(np.stack([flat, forward, backward]))
    assert shares[1] == pytest.approx(0.9 + 0.1 * 5 / 40, abs=1e-6)
    assert shares[0] == pytest.approx(5 / 40)
    assert shares[2] < 0.4
    chosen = choose_heads({(0, head): float(share) for head, share in enumerate(shares)})
    assert (chosen.heads, chosen.share) == (((0, 1),), pytest.approx(shares[1]))


def test_the_path_follows_it() -> None:
    path, share = best_path(matrix([0, 5, 6, 20], 30))
    assert [int(path[frame]) for frame in (0, 5, 6, 20, 29)] == [0, 1, 2, 3, 3]
    assert (np.diff(path) >= 0).all()
    assert set(path) == {0, 1, 2, 3}
    assert share > 0.9
    path, share = best_path(np.full((6, 3), 1 / 3))  # more tokens than audio
    assert (path.tolist(), share) == ([0, 2, 4], 0.0)


def test_silence_belongs_to_no_word() -> None:
    levels = np.zeros(100, np.float32)
    levels[20:40] = 1
    start, end = trim(levels, 0.0, 100 * 0.032)
    assert (start, end) == (pytest.approx(20 * 0.032), pytest.approx(40 * 0.032))
    assert trim(levels, 2.0, 2.4) == (2.0, 2.4)  # nothing is loud there: as it was


def segment_of(
    processor: AudioFlamingo3Processor, text: str, answer: str, duration_s: float = 3.0
) -> Segment:
    tokens = processor.tokenizer.encode_plain(answer)
    window = Window(160000, tone(duration_s)[:, 0])
    return Segment(
        window.start_s, window.end_s, text, tuple(tokens), logprobs=(-0.5,) * len(tokens), window=window
    )


def test_words_are_found_in_their_tokens(processor: AudioFlamingo3Processor) -> None:
    segment = segment_of(processor, "hello, world Ü", framed("hello, world Ü"))
    spans = word_spans(processor, segment)
    assert [span.text for span in spans] == ["hello,", "world", "Ü"]
    for span in spans:
        pieces = segment.tokens[span.first : span.end]
        assert span.text in processor.decode(pieces)
    assert word_spans(processor, segment_of(processor, "not said", framed("hello"))) == []
    assert word_spans(processor, segment_of(processor, "", framed(""))) == []


def test_times_lie_in_the_segment_in_order(processor: AudioFlamingo3Processor) -> None:
    model: Any = tiny_model()
    timer = WordTimer(model, processor, ClipCache())
    text = "hello world Why do you think so"
    with pytest.warns(
        AudioFlamingoWarning, match="the times of words are rough"
    ):  # random weights look anywhere
        timed = timer.time(segment_of(processor, text, framed(text)), TranscriptionOptions())
    assert timed.words is not None
    assert [word.text for word in timed.words] == text.split()
    times = [time for word in timed.words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert times[0] >= timed.start_s
    assert times[-1] <= timed.end_s
    assert timed.words[0].probability == pytest.approx(np.exp(-0.5))
    assert timed.words_certainty is not None
    assert timer.heads is not None
    assert timer.heads.share < 0.4
    assert timed.window is None
    assert timed.to_dict()["words"][0].keys() == {"word", "start_s", "end_s", "probability"}


def test_heads_are_searched_once_for_the_same_weights(
    processor: AudioFlamingo3Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept by the weights in the user's cache, and in the checkpoint; what is unsure is searched again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = "hello world Why do you think so hello world"
    segment, options = segment_of(processor, text, framed(text)), TranscriptionOptions()
    model: Any = tiny_model()
    timer = WordTimer(model, processor, ClipCache())
    with pytest.warns(AudioFlamingoWarning, match="rough"):
        timer.time(segment, options)
    assert known_heads(model) is None
    found = AlignmentHeads(((1, 0), (0, 1)), 0.75)
    keep_heads(model, found)
    assert known_heads(tiny_model()) == found  # another process's model with the same weights
    assert known_heads(tiny_model(seed=1)) is None
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    (cached,) = (tmp_path / "cache").rglob("*.json")
    cached.write_text('{"alignment_heads": [[99, 0]], "alignment_share": 1}')  # no head of this model
    assert known_heads(tiny_model()) is None
    timer = WordTimer(loaded, processor, ClipCache())
    monkeypatch.setattr(timer, "_find_heads", None)
    timer.time(segment, options)
    assert timer.heads == found
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # that cannot be written
    keep_heads(tiny_model(), found)


def test_subtitles_are_cut_at_words() -> None:
    words = [Word(f"word{i:02d}", 10 + 0.5 * i, 10.4 + 0.5 * i) for i in range(24)]
    words[13] = Word("word13.", 16.5, 16.9)  # ends a sentence, but too short a cue
    words += [Word("behind", 24.0, 24.3), Word("a", 24.4, 24.5), Word("pause.", 24.6, 25.0)]
    segment = Segment(10.0, 25.2, " ".join(word.text for word in words), words=tuple(words))
    cues = subtitle_cues(segment)
    first = cues[0]
    assert " ".join(cue.text for cue in cues) == segment.text
    assert all(cue.end_s - cue.start_s <= 7 for cue in cues)
    assert [cue.text.split()[-1] for cue in cues] == ["word11", "word23", "pause."]
    words[16] = Word("word16.", 18.0, 18.4)
    cues = subtitle_cues(Segment(10.0, 25.2, "", words=tuple(words)))
    assert [cue.text.split()[-1] for cue in cues] == ["word11", "word16.", "word23", "pause."]
    assert (first.start_s, first.end_s) == (10.0, pytest.approx(15.9))
    text = format_transcript([segment], "srt")
    assert text.startswith("1\n00:00:10,000 --> 00:00:15,900\nword00 word01")
    assert "\n3\n00:00:24,000 --> 00:00:25,000\nbehind a pause.\n" in text
    assert max(map(len, text.splitlines())) <= 42
    assert (
        format_transcript([Segment(1, 9, segment.text)], "srt").count("-->") == 1
    )  # without word times: as it was
    assert format_transcript([segment], "vtt").count("-->") == 3


def test_the_command(tmp_path: Path) -> None:
    import json

    from tests.support.cli_runs import af3, write_tiny_model
    from tests.support.tiny_training import write_clip

    folder = write_tiny_model(tmp_path)
    clip = write_clip(tmp_path / "a.wav", 2.0, 0)
    command = ("transcribe", clip, "--model", folder, "--no-vad", "--max-new-tokens", 8, "-q", "-f", "jsonl")
    result = af3(*command, "--word-timestamps")
    assert result.exit_code == 0, result.stderr
    for line in result.stdout.splitlines():
        assert "words" in json.loads(line)
    assert "words" not in json.loads(af3(*command).stdout.splitlines()[0])
