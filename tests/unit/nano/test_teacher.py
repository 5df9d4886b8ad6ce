"""Whisper as a teacher of the built-in model: what it is asked, how lessons are kept, and what they do to a loss."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer

from audioflamingo.audio.loading import load_audio
from audioflamingo.datasets.conversations import DataRow
from audioflamingo.hub import BUILT_IN_FOLDER
from recipes.nano.nano_model.assemble import SPECIAL, Tokens
from recipes.nano.nano_model.layout import STATE, float8_factor
from recipes.nano.nano_model.training import teacher as teacher_module
from recipes.nano.nano_model.training.forward import DOWN_FACTOR, in_float8, taught
from recipes.nano.nano_model.training.teacher import SHARE, TOP, Lessons, Soft, Teacher, transcript_of


def row(answer: str, audio: tuple[str, ...] = ("DATA/audio/a/b/c/clip.flac",)) -> DataRow:
    """A row about recordings that ends with an answer."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Transcribe."}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return DataRow("id", messages, audio, 1.0, "file:1")


TRANSCRIPT = 'The spoken content of the audio is "Good morning.".'


def test_only_a_transcript_of_a_single_clip_is_taught():
    assert transcript_of(row(TRANSCRIPT)) == "Good morning."
    assert transcript_of(row('A woman is speaking and she says "Good morning.".')) == "Good morning."
    assert transcript_of(row(TRANSCRIPT, ("a.flac", "b.flac"))) is None
    assert transcript_of(row('The spoken content of the audio is "".')) is None
    assert transcript_of(row("This is the sound of rain.")) is None


class Decoder:
    """Stands in for Whisper: the last state is what a token's row of the output layer says of the token itself."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.output = torch.randn(size, STATE, generator=generator)
        self.norm = (torch.ones(STATE), torch.zeros(STATE))
        self.asked: list[int] = []

    def states(self, tokens: torch.Tensor, frames: torch.Tensor) -> list[torch.Tensor]:
        """The output rows of the tokens that come next."""
        self.asked = tokens.tolist()
        following = torch.cat([tokens[1:], tokens[-1:]])
        return [self.output[following]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUILT_IN_FOLDER / "tokenizer.json"))


def decoder_and_teacher(tokenizer: Tokenizer) -> tuple[Decoder, Teacher]:
    """A teacher whose tokens have Whisper's numbers."""
    decoder = Decoder(60_000)
    ordinary = len(Tokens(tokenizer).names) - len(SPECIAL)
    return decoder, Teacher(decoder, range(ordinary), tokenizer)  # type: ignore[arg-type]


def test_the_teacher_is_asked_about_the_same_tokens_behind_its_own_opening(tokenizer):
    decoder, teacher = decoder_and_teacher(tokenizer)
    ids = teacher.ids("Good morning.")
    assert tokenizer.decode(ids) == "Good morning."
    likeliest, shares = teacher.expects("Good morning.", torch.zeros(3, STATE))
    assert decoder.asked == [50257, 50362, *ids]
    assert likeliest.shape == shares.shape == (len(ids), TOP)
    assert likeliest[:, 0].tolist() == ids
    np.testing.assert_allclose(shares.astype(np.float32).sum(1), 1, atol=2e-3)


def test_a_transcript_opens_without_a_space_and_goes_on_with_one(tokenizer):
    """Twins of a word have one row of Whisper's: only the one that fits the place may be expected."""
    tokens = Tokens(tokenizer)
    spaced, bare = tokenizer.token_to_id("ĠGood"), tokenizer.token_to_id("Good")
    rows = list(range(len(tokens.names) - len(SPECIAL)))
    rows[bare] = spaced
    teacher = Teacher(Decoder(60_000), rows, tokenizer)  # type: ignore[arg-type]
    likeliest, _ = teacher.expects("Good, Good.", torch.zeros(3, STATE))
    first, later = likeliest[0].tolist(), likeliest[2].tolist()
    assert bare in first
    assert spaced not in first
    assert spaced in later
    assert bare not in later


def test_what_has_no_token_here_is_not_taught(tokenizer):
    """Where Whisper expects a digit, the rest of its expectations say nothing about the word."""
    decoder, teacher = decoder_and_teacher(tokenizer)
    ids = teacher.ids("Good morning.")
    decoder.output[59_999] = 3 * decoder.output[ids[1]]  # no token here, and likelier than the word
    _, shares = teacher.expects("Good morning.", torch.zeros(3, STATE))
    assert shares[0].sum() > 0.99
    assert not shares[1].any()


def lessons_with(folder, transcript: str, count: int) -> Lessons:
    """Lessons on disk about one transcript of `count` tokens."""
    lessons = Lessons(folder)
    tokens = np.arange(count * TOP, dtype=np.int32).reshape(count, TOP)
    shares = np.full((count, TOP), 1 / TOP, np.float16)
    lessons._write({f"a/b/c/clip.flac|{transcript}": (tokens, shares)})
    return lessons


def test_lessons_are_read_again_by_recording_and_transcript(tmp_path):
    lessons_with(tmp_path, "Good morning.", 3)
    lessons_with(tmp_path, "Hello.", 2)
    (tmp_path / ".lessons-half.npz").write_bytes(b"cut short")
    lessons = Lessons(tmp_path)
    lessons.reload()
    tokens, shares = lessons.get(row(TRANSCRIPT))
    assert tokens.shape == shares.shape == (3, TOP)
    assert lessons.get(row('The spoken content of the audio is "Goodbye.".')) is None
    assert lessons.get(row(TRANSCRIPT, ("DATA/audio/a/b/c/other.flac",))) is None


def test_a_clip_that_cannot_be_read_keeps_no_other_from_its_lesson(tmp_path, monkeypatch, capsys):
    damaged, whole = tmp_path / "damaged.flac", tmp_path / "whole.wav"
    damaged.write_bytes(b"fLaC and no more")
    soundfile.write(whole, np.zeros(1600, np.int16), 16000)
    monkeypatch.setattr(teacher_module, "padded_rows", lambda row, *_: load_audio(row.audio[0]))
    expected = np.zeros((2, TOP), np.int32), np.zeros((2, TOP), np.float16)
    teacher = SimpleNamespace(expects=lambda *_: expected)
    lessons = Lessons(tmp_path / "lessons")
    rows = [row(TRANSCRIPT, (str(path),)) for path in (damaged, whole)]
    assert lessons.make(rows, teacher, None, None) == 2
    assert lessons.get(rows[0]) is None
    assert lessons.get(rows[1]) is not None
    assert "damaged.flac" in capsys.readouterr().out


def test_lessons_are_laid_behind_the_last_quote_of_their_row_and_leave_the_end_alone(tmp_path):
    lessons = lessons_with(tmp_path, "Good morning.", 3)
    quote = 7
    labels = torch.tensor([1, 2, 1, quote, 11, 12, 13, 3])  # another row; opening, quote, three words, end
    soft = lessons.soft(
        [row("Rain."), row(TRANSCRIPT)], quote, labels, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    )
    assert soft.is_taught.tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert soft.tokens[4:6].flatten().tolist() == list(range(2 * TOP))
    untaught = lessons.soft([row("Rain."), None], quote, labels, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]))
    assert not untaught.is_taught.any()


def test_a_taught_loss_is_that_of_mixed_labels():
    logits, labels = torch.randn(3, 50), torch.tensor([4, 5, 6])
    tokens = torch.randint(50, (3, TOP))
    shares = torch.rand(3, TOP)
    shares /= shares.sum(1, keepdim=True)
    soft = Soft(tokens, shares, torch.tensor([True, False, True]))
    hard = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    mixed = torch.zeros(3, 50).scatter_add_(1, tokens, SHARE * shares)
    mixed[torch.arange(3), labels] += 1 - SHARE
    expected = torch.nn.functional.cross_entropy(logits, mixed, reduction="none")
    found = taught(hard, logits, soft)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert found[1] == hard[1]
    assert torch.equal(taught(hard, logits, Soft(tokens, shares, torch.zeros(3, dtype=torch.bool))), hard)


@pytest.mark.parametrize("stream", [1.0, DOWN_FACTOR])
def test_float8_in_training_is_what_storing_does_and_gradients_pass(stream):
    weight = (0.05 * torch.randn(64, 64)).requires_grad_()
    found = in_float8(weight, stream)
    factor = float8_factor(weight.detach()) * stream
    stored = (weight.detach() * factor).to(torch.float8_e4m3fn)
    assert stored.float().abs().max() <= 448
    torch.testing.assert_close(found.detach(), stored.float() / factor)
    assert 0 < (found - weight).norm() < 0.04 * weight.norm()
    found.sum().backward()
    assert (weight.grad == 1).all()


def test_a_matrix_of_nought_stays_nought_in_float8():
    assert not in_float8(torch.zeros(4, 4)).any()


def test_the_lessons_file_names_its_keys(tmp_path):
    lessons_with(tmp_path, "Hello.", 2)
    (file,) = tmp_path.glob("lessons-*.npz")
    with np.load(file) as shard:
        assert json.loads(str(shard["keys"])) == ["a/b/c/clip.flac|Hello."]
