"""Music Flamingo in this package: clips in a turn, the engine, dtypes and folders, token ids from the files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import audioflamingo
from audioflamingo import (
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    AutoModelForConditionalGeneration,
    AutoProcessor,
    Chat,
    MusicFlamingoForConditionalGeneration,
    MusicFlamingoProcessor,
)
from audioflamingo.config import MusicFlamingoConfig, read_model_config
from audioflamingo.errors import ArgumentError, CheckpointError, ConfigError
from audioflamingo.tasks import AF_NEXT_SYSTEM_PROMPT, MUSIC_FLAMINGO_SYSTEM_PROMPT
from tests.support.checkpoint_folders import SINGLE, edit_json
from tests.support.tiny_family import (
    BOS_ID,
    EOS_ID,
    make_music_batch,
    music_config_dict,
    tiny_music_model,
    write_music_processor,
)
from tests.support.tiny_model import AUDIO_TOKEN_ID, make_batch, tiny_model
from tests.support.tiny_tokenizer import write_tiny_processor


@pytest.fixture(scope="module")
def model() -> MusicFlamingoForConditionalGeneration:
    return tiny_music_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model) -> Path:
    folder = tmp_path_factory.mktemp("music")
    write_music_processor(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> MusicFlamingoProcessor:
    return AutoProcessor.from_pretrained(folder)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal(int(16000 * seconds))).astype(np.float32)


def message(*parts) -> dict:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


TEMPLATE = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}


# Clips and time


@torch.no_grad()
def test_time_starts_anew_with_every_clip(model) -> None:
    """Two clips of two and one window: each is what it is alone; their order changes nothing but the order."""
    both = make_music_batch([([[3000, 300], [700]], 6)])
    encoded = model.get_audio_features(both["input_features"], both["input_features_mask"], both["input_ids"])
    counts = [825, 175]
    assert encoded.pooler_output.shape[0] == sum(counts)
    for first, last, indices in ((0, 2, [0, 1]), (2, 3, [0])):
        part = slice(first, last)
        alone = model.get_audio_features(
            both["input_features"][part], both["input_features_mask"][part], window_index=indices
        )
        rows = encoded.pooler_output[: counts[0]] if first == 0 else encoded.pooler_output[counts[0] :]
        torch.testing.assert_close(alone.pooler_output, rows, atol=1e-5, rtol=0)
    late = model.get_audio_features(
        both["input_features"][2:], both["input_features_mask"][2:], window_index=[2]
    )
    assert (late.pooler_output - encoded.pooler_output[counts[0] :]).abs().max() > 0.1


def test_windows_without_a_clip_to_belong_to_are_refused(model) -> None:
    batch = make_music_batch([([[3000, 300]], 6)])
    with pytest.raises(ArgumentError, match="2 windows: this model hears the time"):
        model.get_audio_features(batch["input_features"], batch["input_features_mask"])


@torch.no_grad()
def test_a_batch_is_each_row_alone(model) -> None:
    rows = [([[50]], 5), ([[3000, 100], [200]], 9), ([], 4), ([[3000]], 3)]
    together = make_music_batch(rows)
    got = model(**together).logits
    first = 0
    for index, (clips, _) in enumerate(rows):
        mask = together["attention_mask"][index].bool()
        alone = {"input_ids": together["input_ids"][index : index + 1, mask]}
        num_windows = sum(map(len, clips))
        if num_windows:
            for name in ("input_features", "input_features_mask"):
                alone[name] = together[name][first : first + num_windows]
        first += num_windows
        torch.testing.assert_close(model(**alone).logits[0], got[index, mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seconds", [2.5, 61.0])
def test_every_door_hears_the_same_time(model, processor, seconds) -> None:
    """`generate`, a conversation (prefix cache) and a server's engine (audio in slices) give one answer."""
    from audioflamingo.engine.engine import Engine
    from audioflamingo.engine.generate_call import prepare_one
    from audioflamingo.engine.limits import EngineOptions

    messages = [message(noise(seconds), "What is", noise(31.0, 1), " and the end")]
    options = {"max_new_tokens": 12, "eos_token_id": -1 % 512, "pad_token_id": 0}
    batch = processor.apply_chat_template([messages], **TEMPLATE)
    sequence = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :].tolist()
    with torch.no_grad():
        ids = batch["input_ids"]
        for token in sequence[:6]:  # without a cache, step by step
            logits = model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            assert int(logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)

    found: list[int] = []
    engine = Engine(model, processor.tokenizer, EngineOptions(cache_tokens=8192))
    for _ in range(2):  # the second time from the caches
        found.clear()
        request = prepare_one(model, processor.prompt(messages), options, lambda o: found.extend(o.token_ids))
        engine.submit(request)
        while engine.has_work:
            engine.step()
        assert found == sequence


def test_equal_windows_at_other_times_are_not_confused(model, processor) -> None:
    """One minute of the same half minute twice: in AF3 the windows share their work, here they must not."""
    half = noise(30.0, 3)
    prompt = processor.prompt([message(np.concatenate([half, half]), "What")])
    first, second = prompt.windows
    assert (first.index, second.index) == (0, 1)
    assert first.key != second.key
    assert prompt.identity[first.start] != prompt.identity[second.start]
    other = processor.prompt([message(half, half, "What")])
    assert [window.index for window in other.windows] == [0, 0]
    assert other.windows[0].key == other.windows[1].key == first.key


def test_marks_stand_around_each_clip_and_are_not_learned(processor) -> None:
    messages = [message(noise(1.0), "What", noise(31.0)), {"role": "assistant", "content": "The sound"}]
    options = {"tokenize": True, "return_dict": True}
    batch = processor.apply_chat_template(messages, output_labels=True, **options)
    ids = batch["input_ids"][0]
    assert int((ids == BOS_ID).sum()) == int((ids == EOS_ID).sum()) == 2
    runs = "".join({BOS_ID: "(", EOS_ID: ")", AUDIO_TOKEN_ID: "a"}.get(i, ".") for i in ids.tolist())
    assert "(" + 25 * "a" + ")" in runs
    assert "(" + 775 * "a" + ")" in runs
    hidden = torch.isin(ids, torch.tensor(processor.audio_token_ids))
    assert torch.equal(batch["labels"][0] == -100, hidden)
    assert processor.prompt(messages, add_generation_prompt=False, labels=True).token_ids == ids.tolist()


# Time is never rounded


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_time_stays_exact_in_half_precision(model, dtype, tmp_path: Path) -> None:
    """In transformers `.to(bfloat16)` rounds the tables: the audio is then 20 % off, in silence."""
    model.save_pretrained(tmp_path)
    loaded = AutoModelForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    cast = copy.deepcopy(model).to(dtype)
    batch = make_music_batch([([[3000, 3000, 700]], 6)])
    assert torch.equal(cast(**batch).logits, loaded(**batch).logits)
    back = cast.float()
    rows = torch.randn(4, 32)
    time = model.model._rotary_time(rows, [4], [59])
    assert torch.equal(back.model._rotary_time(rows, [4], [59]), time)
    assert not [name for name in model.state_dict() if "rotary" in name or "pos_emb" in name]


# Which class


def test_each_class_names_the_other(folder: Path, tmp_path: Path) -> None:
    assert (
        type(AutoModelForConditionalGeneration.from_pretrained(folder))
        is MusicFlamingoForConditionalGeneration
    )
    with pytest.raises(ConfigError, match="MusicFlamingoForConditionalGeneration, or with AutoModel"):
        AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(
        CheckpointError, match="is a MusicFlamingoProcessor, not a AudioFlamingo3Processor; Auto"
    ):
        AudioFlamingo3Processor.from_pretrained(folder)
    tiny_model().save_pretrained(tmp_path)
    write_tiny_processor(tmp_path)
    assert (
        type(AutoModelForConditionalGeneration.from_pretrained(tmp_path))
        is AudioFlamingo3ForConditionalGeneration
    )
    assert type(AutoProcessor.from_pretrained(tmp_path)) is AudioFlamingo3Processor
    with pytest.raises(ConfigError, match="AudioFlamingo3ForConditionalGeneration, or with AutoModel"):
        MusicFlamingoForConditionalGeneration.from_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", model_type="llama")
    with pytest.raises(ConfigError, match=r"'llama'.*'audioflamingo3', 'musicflamingo' only"):
        AutoModelForConditionalGeneration.from_pretrained(tmp_path)


def test_the_draft_name_is_an_alias(folder: Path, tmp_path: Path) -> None:
    values = {**music_config_dict(), "model_type": "audioflamingonext"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_model_config(tmp_path)
    assert type(config) is MusicFlamingoConfig
    assert config.to_dict()["model_type"] == "musicflamingo"
    write_music_processor(tmp_path)
    edit_json(tmp_path / "processor_config.json", processor_class="AudioFlamingoNextProcessor")
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MusicFlamingoProcessor


# Token ids from the files


@pytest.mark.parametrize("name", ["audio_token_id", "audio_bos_token_id", "audio_eos_token_id"])
def test_an_id_that_the_tokenizer_does_not_have_is_refused(tmp_path: Path, model, name: str) -> None:
    write_music_processor(tmp_path)
    model.save_pretrained(tmp_path)
    right = json.loads((tmp_path / "config.json").read_text())[name]
    edit_json(tmp_path / "config.json", **{name: 400})
    for load in (AutoModelForConditionalGeneration, AutoProcessor):
        with pytest.raises(CheckpointError, match=rf"{name} is 400 in config.json.* the id {right}"):
            load.from_pretrained(tmp_path)


def test_other_ids_are_read_from_the_files(tmp_path: Path) -> None:
    """`<sound>` is 151667 in the published files of Music Flamingo, not the default of its class."""
    config = MusicFlamingoConfig.from_dict({"audio_token_id": 151667, "audio_bos_token_id": 151668})
    assert config.audio_token_id == 151667


def test_audio_flamingo_3s_id_is_checked_too(tmp_path: Path) -> None:
    write_tiny_processor(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", audio_token_id=17)
    with pytest.raises(CheckpointError, match=r"audio_token_id is 17 .* the id 500"):
        AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path)


# Configuration


def test_text_rope_and_context_of_audio_flamingo_next() -> None:
    for text in (
        {"rope_theta": 15300000, "max_position_embeddings": 131072, "use_cache": False},
        {"rope_parameters": {"rope_theta": 15300000.0}, "max_position_embeddings": 131072},
    ):
        config = MusicFlamingoConfig.from_dict({"text_config": text})
        assert config.text_config.rope_theta == 15.3e6
        assert config.text_config.max_position_embeddings == 131072


def test_thirty_minutes_fit(folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder, max_audio_len=1800)
    prompt = processor.prompt([message(np.zeros(1800 * 16000, dtype=np.float32), "What")])
    assert len(prompt.windows) == 60
    assert prompt.num_audio_tokens == 45000
    assert prompt.windows[-1].index == 59
    assert prompt.token_ids.count(BOS_ID) == 1


def test_early_files_are_completed() -> None:
    config = MusicFlamingoConfig.from_dict(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1200}, "head_dim": 256}
    )
    assert config.rope_parameters["partial_rotary_factor"] == 0.2
    assert config.to_dict()["head_dim"] == 1280
    assert (
        MusicFlamingoConfig.from_dict({"audio_config": {"model_type": None}}).audio_config.hidden_size == 1280
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_theta": 100}}, "rope_theta must be at least 750"),
        ({"rope_parameters": {"partial_rotary_factor": 0.7}}, "turns 1792 of 1280"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not implemented"),
        ({"audio_bos_token_id": 999999}, "audio_bos_token_id 999999 is outside"),
    ],
)
def test_impossible_settings_are_refused(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        MusicFlamingoConfig.from_dict(change)


# Files


def test_foreign_files_are_not_read(tmp_path: Path, model) -> None:
    """Other tools leave `latent_w_remap.safetensors` beside the shards."""
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    save_file({"avg_embed_norm": torch.ones(1)}, tmp_path / "latent_w_remap.safetensors")
    AutoModelForConditionalGeneration.from_pretrained(tmp_path)


def test_stored_frequencies_are_dropped_and_compared(tmp_path: Path, model, recwarn) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    name = "audio_tower.pos_emb.freqs"
    right = 1 / 1200 ** (torch.arange(0, 8, 2) / 8)
    save_file({**tensors, name: right}, tmp_path / SINGLE, {"format": "pt"})
    AutoModelForConditionalGeneration.from_pretrained(tmp_path)
    assert not recwarn.list
    save_file({**tensors, name: right * 2}, tmp_path / SINGLE, {"format": "pt"})
    with pytest.warns(audioflamingo.errors.AudioFlamingoWarning, match="holds other frequencies"):
        AutoModelForConditionalGeneration.from_pretrained(tmp_path)


def test_quantized_and_back(folder: Path, tmp_path: Path) -> None:
    from audioflamingo.quantize_folder import quantize_checkpoint

    quantize_checkpoint(folder, tmp_path / "int8", "int8")
    loaded = AutoModelForConditionalGeneration.from_pretrained(tmp_path / "int8")
    assert type(loaded) is MusicFlamingoForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path / "int8")) is MusicFlamingoProcessor
    batch = make_music_batch([([[3000, 300]], 6)])
    with torch.no_grad():
        got, expected = loaded(**batch).logits, tiny_music_model()(**batch).logits
    assert torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1] > 0.98


# Text


def test_system_texts_byte_for_byte(processor, folder: Path, tmp_path: Path) -> None:
    assert len(MUSIC_FLAMINGO_SYSTEM_PROMPT.encode()) == 379
    assert "music--regardlenss of whether" in MUSIC_FLAMINGO_SYSTEM_PROMPT
    assert "audio\u2014regardless" in AF_NEXT_SYSTEM_PROMPT
    bare = write_music_processor(tmp_path)
    (bare / "chat_template.jinja").unlink()
    text = AutoProcessor.from_pretrained(bare).apply_chat_template(
        [message(noise(1.0), "What is surprising?")], add_generation_prompt=True
    )
    assert text == (
        f"<|im_start|>system\n{MUSIC_FLAMINGO_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<sound>What is surprising?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_transcription_requests_exist_here(model, processor) -> None:
    batch = processor.apply_transcription_request(audio=noise(1.0))
    assert int((batch["input_ids"] == AUDIO_TOKEN_ID).sum()) == 25
    assert (
        processor.decode(
            processor.tokenizer.encode_plain('The content of the input audio is "hello".'), strip_prefix=True
        )
        == "hello"
    )
    text = audioflamingo.transcribe(model, processor, noise(2.0), max_new_tokens=4)
    assert text is not None


def test_a_conversation(model, processor) -> None:
    chat = Chat(model, processor)
    chat.add_audio(noise(2.0))
    "".join(chat.ask("What", max_new_tokens=4, eos_token_id=511))
    chat.add_audio(noise(33.0))
    "".join(chat.ask("and", max_new_tokens=4, eos_token_id=511))
    assert chat.num_reused > 50


def test_audio_flamingo_3_is_what_it_was() -> None:
    """Windows of AF3 know no time: equal ones share their work wherever they stand."""
    batch = make_batch([([3000, 300], 6)])
    model = tiny_model()
    with torch.no_grad():
        by_number = model.get_audio_features(
            batch["input_features"], batch["input_features_mask"], window_index=[5, 6]
        )
        plain = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
    assert torch.equal(by_number.pooler_output, plain.pooler_output)
