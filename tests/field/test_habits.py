"""What people do because another library taught them so (README.md beside this file has the reports)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from audioflamingo.audio.loading import load_audio
from audioflamingo.errors import ArgumentError, AudioError, AudioFlamingoWarning, ConfigError, DeviceError
from audioflamingo.evaluation.scoring import normalize, word_errors
from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.processor import AudioFlamingo3Processor
from tests.support.audio_files import tone
from tests.support.generation_models import MANY_EOS, lively_model
from tests.support.tiny_model import make_batch, tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor

RATE = 8000
HALVES = (torch.float16, torch.bfloat16)
MONO = tone(1.0, rate=RATE)[:, 0]
STEREO = np.stack([MONO, MONO * 0.5])
SPEECH = Path(__file__).parents[1] / "data" / "directory_prompt.flac"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo3Processor:
    return AudioFlamingo3Processor.from_pretrained(write_tiny_processor(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model()


class Decoder:
    """As torchcodec's and `datasets`': samples (channels, N) when asked for."""

    def get_all_samples(self) -> Any:
        return SimpleNamespace(data=torch.from_numpy(STEREO), sample_rate=RATE)


class Column(Sequence[Any]):
    """As a column of `datasets`: a sequence that is no list."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


FORMS: dict[str, tuple[Any, np.ndarray]] = {
    "a row of datasets": ({"path": None, "array": MONO, "sampling_rate": RATE}, MONO),
    "its samples as a list": ({"array": MONO.tolist(), "sampling_rate": RATE}, MONO),
    "an AudioDecoder": (Decoder(), STEREO),
    "gradio's pair": ((RATE, (STEREO.T * 32767).astype(np.int16)), (STEREO * 32767).astype(np.int16)),
    "soundfile's pair": ((STEREO.T, RATE), STEREO),
    "torchaudio's pair": ((torch.from_numpy(STEREO), RATE), STEREO),
    "NumPy's integer": ((np.int64(RATE), MONO), MONO),
    "a pipeline's input": ({"raw": MONO, "sampling_rate": RATE}, MONO),
    "nothing masked": ((RATE, np.ma.masked_array(MONO)), MONO),
}


class TestFormsOfAudio:
    @pytest.mark.parametrize(("form", "array"), FORMS.values(), ids=FORMS)
    def test_it_is_the_audio(self, form: Any, array: np.ndarray) -> None:
        np.testing.assert_array_equal(load_audio(form), load_audio(array, sampling_rate=RATE))

    @pytest.mark.parametrize(
        "row", [{"bytes": SPEECH.read_bytes(), "path": "a.flac"}, {"path": str(SPEECH)}, {"url": str(SPEECH)}]
    )
    def test_a_row_that_is_not_decoded(self, row: dict[str, Any]) -> None:
        np.testing.assert_array_equal(load_audio(row), load_audio(SPEECH))

    def test_they_are_one_clip_or_several_as_meant(self, processor: AudioFlamingo3Processor) -> None:
        """A pair was read as a batch of two; a column was refused."""
        expected = processor.apply_transcription_request(audio=MONO, sampling_rate=RATE)
        one = processor.apply_transcription_request(audio=(RATE, MONO))
        row = {"array": MONO, "sampling_rate": RATE}
        several = processor.apply_transcription_request(audio=Column([row, (RATE, MONO), Decoder()]))
        assert torch.equal(one["input_features"], expected["input_features"])
        assert several["input_ids"].shape[0] == 3
        assert torch.equal(several["input_features"][:2], expected["input_features"].repeat(2, 1, 1))

    def test_in_a_conversation(self, processor: AudioFlamingo3Processor) -> None:
        def ids(**part: Any) -> Any:
            content = [{"type": "audio", **part}, {"type": "text", "text": "What is it"}]
            return processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True
            )

        expected = ids(path=str(SPEECH))
        for batch in (ids(audio_url=str(SPEECH)), ids(audio={"path": str(SPEECH)})):
            assert torch.equal(batch["input_ids"], expected["input_ids"])
            assert torch.equal(batch["input_features"], expected["input_features"])

    def test_rates_that_contradict_each_other(self) -> None:
        with pytest.raises(ArgumentError, match="contradicts"):
            load_audio((RATE, MONO), sampling_rate=16000)

    @pytest.mark.parametrize("row", [{}, {"audio": "x"}, {"array": None, "bytes": None, "path": None}])
    def test_a_dict_without_audio(self, row: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError, match="'bytes', or a 'path'"):
            load_audio(row)

    def test_masked_samples(self) -> None:
        masked = np.ma.masked_array(MONO, mask=np.arange(len(MONO)) < 5)
        with pytest.raises(AudioError, match="5 samples of the array are masked"):
            load_audio(masked)

    def test_one_rate_for_each_clip(self, processor: AudioFlamingo3Processor) -> None:
        fast = load_audio(MONO, sampling_rate=RATE)
        batch = processor.apply_transcription_request(audio=[MONO, fast], sampling_rate=[RATE, 16000])
        assert torch.equal(batch["input_features"][0], batch["input_features"][1])
        with pytest.raises(ArgumentError, match="1 entries for 2 clips"):
            processor.apply_transcription_request(audio=[MONO, fast], sampling_rate=[RATE])

    def test_a_batch_as_one_array(self) -> None:
        """Eight clips became the mean of them, silently."""
        with pytest.warns(AudioFlamingoWarning, match="one clip of 8 channels"):
            load_audio(np.stack([MONO] * 8))


class TestFeatureExtractor:
    def test_it_is_called_as_transformers_is(self, processor: AudioFlamingo3Processor) -> None:
        waveform = load_audio(SPEECH)
        reference = transformers.WhisperFeatureExtractor(
            feature_size=processor.feature_extractor.feature_size
        )
        options = {"sampling_rate": 16000, "return_tensors": "pt"}
        expected = reference(waveform, return_attention_mask=True, **options)
        for found in (
            processor.feature_extractor(waveform, **options),
            processor.feature_extractor([waveform.tolist()], **options),
        ):
            torch.testing.assert_close(found["input_features"], expected["input_features"], atol=1e-4, rtol=0)
            assert torch.equal(found["attention_mask"], expected["attention_mask"].int())

    def test_another_rate(self, processor: AudioFlamingo3Processor) -> None:
        with pytest.raises(AudioError, match="resample to 16000 Hz"):
            processor.feature_extractor(MONO, sampling_rate=RATE)
        with pytest.raises(ArgumentError, match="'np'"):
            processor.feature_extractor(MONO, return_tensors="np")

    def test_words_that_change_nothing(self, processor: AudioFlamingo3Processor) -> None:
        plain = processor.feature_extractor(MONO)
        usual = {"padding": "max_length", "truncation": True, "return_attention_mask": True, "device": "cpu"}
        found = processor.feature_extractor(MONO, **usual, max_length=None, return_tensors=None)
        assert torch.equal(found["input_features"], plain["input_features"])

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ({"padding": "longest"}, r"feature_extractor\(padding='longest'\) is not implemented"),
            ({"max_length": 3}, "not implemented"),
            ({"paddding": True}, "did you mean 'padding'"),
        ],
    )
    def test_words_that_would(
        self, processor: AudioFlamingo3Processor, word: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ArgumentError, match=message):
            processor.feature_extractor(MONO, **word)


class TestTokenizer:
    def test_words_that_change_nothing(self, processor: AudioFlamingo3Processor) -> None:
        found = processor.tokenizer("hi", padding=False, truncation=False, return_tensors=None)
        assert found == processor.tokenizer("hi")

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ({"return_tensors": "pt"}, r"processor\(text=...\) gives padded tensors"),
            ({"padding": True}, "not implemented"),
            ({"paddding": True}, "did you mean 'padding'"),
        ],
    )
    def test_words_that_would(
        self, processor: AudioFlamingo3Processor, word: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ArgumentError, match=message):
            processor.tokenizer("hi", **word)


ROWS = [([50], 5), ([], 12), ([3000, 40], 9)]


def answer(model: Any, rows: Any = ROWS, **options: Any) -> Any:
    defaults = {"max_new_tokens": 10, "eos_token_id": MANY_EOS, "pad_token_id": 7}
    return model.generate(**make_batch(rows), **{**defaults, **options})


class TestGenerationConfig:
    def test_of_transformers(self, model: Any) -> None:
        config = transformers.GenerationConfig(
            max_new_tokens=6, num_beams=2, repetition_penalty=1.2, eos_token_id=MANY_EOS, pad_token_id=7
        )
        found = model.generate(**make_batch(ROWS), generation_config=config)
        assert torch.equal(found, answer(model, max_new_tokens=6, num_beams=2, repetition_penalty=1.2))

    def test_the_callers_words_win(self, model: Any) -> None:
        config = transformers.GenerationConfig(max_new_tokens=6, num_beams=2)
        assert torch.equal(answer(model, generation_config=config, num_beams=1), answer(model, num_beams=1))

    def test_what_is_not_here(self, model: Any) -> None:
        config = transformers.GenerationConfig(bad_words_ids=[[3]])
        with pytest.raises(ArgumentError, match=r"bad_words_ids=...\) is not implemented"):
            answer(model, generation_config=config)


class OnlyEven(transformers.LogitsProcessor):
    """Forbids odd tokens, and notes what it saw."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.tolist()
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


class TestOwnRules:
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}])
    def test_logits_processors(self, model: Any, options: dict[str, Any]) -> None:
        rule = OnlyEven()
        processors = transformers.LogitsProcessorList([rule])
        batch = make_batch(ROWS)
        new = answer(model, logits_processor=processors, eos_token_id=[], **options)
        assert bool((new[:, batch["input_ids"].shape[1] :] % 2 == 0).all())
        prompts = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert all(any(ids[: len(prompt)] == prompt for prompt in prompts) for ids in rule.seen)

    def test_transformers_own_equals_ours(self, model: Any) -> None:
        own = [transformers.RepetitionPenaltyLogitsProcessor(1.3)]
        assert torch.equal(answer(model, logits_processor=own), answer(model, repetition_penalty=1.3))

    def test_a_processor_that_returns_nothing(self, model: Any) -> None:
        with pytest.raises(ArgumentError, match="must return scores"):
            answer(model, logits_processor=[lambda ids, scores: None])

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_stopping_criteria(self, model: Any, num_beams: int) -> None:
        """Each row ends by itself, and counts its prompt without the padding."""
        longest = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(max_length=5000)])
        batch = make_batch(ROWS)
        output = answer(
            model,
            stopping_criteria=[lambda ids, scores: ids[:, -1] % 3 == 0, *longest],
            eos_token_id=[],
            num_beams=num_beams,
            max_new_tokens=30,
            return_dict_in_generate=True,
        )
        width = batch["input_ids"].shape[1]
        for row, count, reason in zip(
            output.sequences, output.num_new_tokens, output.finish_reasons, strict=True
        ):
            new = row[width : width + count].tolist()
            assert all(token % 3 for token in new[:-1])
            assert (reason == "stop") == (new[-1] % 3 == 0)
        assert "stop" in output.finish_reasons

    def test_the_length_counts_real_tokens(self, model: Any) -> None:
        batch = make_batch(ROWS)
        lengths = batch["attention_mask"].sum(1).tolist()
        most = max(lengths) + 2
        output = answer(
            model,
            stopping_criteria=[transformers.MaxLengthCriteria(max_length=most)],
            eos_token_id=[],
            max_new_tokens=10**3,
            return_dict_in_generate=True,
        )
        assert output.num_new_tokens == [most - length for length in lengths]

    def test_no_callables(self, model: Any) -> None:
        with pytest.raises(ArgumentError, match="stopping_criteria must be a list of callables"):
            answer(model, stopping_criteria="stop")

    def test_another_kind_of_cache(self) -> None:
        with pytest.raises(ArgumentError, match=r"KVCache \(model.new_cache\), got DynamicCache"):
            tiny_model()(**make_batch([([], 5)]), past_key_values=transformers.DynamicCache())


class TestAutocast:
    """A float16 model under bfloat16 autocast: transformers fails likewise, in torch's words about scalar types."""

    @pytest.mark.parametrize("halves", [HALVES, HALVES[::-1]], ids=str)
    @pytest.mark.parametrize("with_audio", [True, False])
    def test_two_halves_are_one_clear_error(self, halves: tuple[torch.dtype, ...], with_audio: bool) -> None:
        model, batch = tiny_model().to(halves[0]), make_batch([([300], 6)])
        if not with_audio:
            batch = {"input_ids": torch.tensor([[5, 6, 7]])}
        with torch.autocast("cpu", halves[1]), pytest.raises(DeviceError, match=r"load it with dtype="):
            model.generate(**batch, max_new_tokens=2, num_beams=1)

    @pytest.mark.parametrize("halves", [HALVES, HALVES[::-1]], ids=str)
    def test_features_in_the_other_half(self, halves: tuple[torch.dtype, ...]) -> None:
        batch = make_batch([([300], 6)])
        batch["input_features"] = batch["input_features"].to(halves[0])
        with torch.autocast("cpu", halves[1]):
            output = tiny_model().generate(**batch, max_new_tokens=1, num_beams=1)
        assert output.shape[1] == batch["input_ids"].shape[1] + 1


class TestTrainer:
    def test_its_checkpoints_load_and_go_on(self, tmp_path: Path) -> None:
        """It saves weights without a config: that is said, with the word that loads them."""
        rows = [make_batch([([300], 6 + n)], "right", seed=n) for n in range(4)]
        data = [{**row, "labels": row["input_ids"].clone()} for row in rows]

        def train(model: Any, steps: int, **options: Any) -> Any:
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=1,
                max_steps=steps,
                save_steps=2,
                lr_scheduler_type="constant",
                report_to=[],
                use_cpu=True,
                seed=0,
            )
            trainer = transformers.Trainer(
                model, arguments, train_dataset=data, data_collator=lambda rows: rows[0]
            )
            trainer.train(**options)
            return model

        whole = train(tiny_model(), 4)
        folder = tmp_path / "checkpoint-2"
        with pytest.raises(ConfigError, match=r"config=model[.]config"):
            AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
        half = AudioFlamingo3ForConditionalGeneration.from_pretrained(
            folder, config=whole.config, dtype=torch.float32
        )
        resumed = train(half, 4, resume_from_checkpoint=str(folder))
        for (name, found), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, expected, msg=name)


@pytest.mark.parametrize(
    ("said", "written", "errors"),
    [
        ("it costs 1,000 dollars", "it costs 1000 dollars", 0),
        ("1,000,000 and 2", "1000000 and 2", 0),
        ("1,2 or 3,45", "12 or 345", 4),
        ("in 1,0000", "in 10000", 2),
    ],
)
def test_commas_of_thousands(said: str, written: str, errors: int) -> None:
    assert word_errors(normalize(said), normalize(written))[0] == errors
