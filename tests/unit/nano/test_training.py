"""The built-in model's own trainer: its forward pass and its answers are the model's, and exact parts stay."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioflamingo import AudioFlamingo3ForConditionalGeneration
from audioflamingo.datasets.conversations import DataRow
from audioflamingo.training.batches import Batch
from recipes.nano.nano_model.layout import (
    ANSWER,
    AUDIO,
    CONST,
    EPS,
    FLAG,
    HEADER,
    MARK,
    NUM_LAYERS,
    OPEN,
    SINK,
    SINK_NORMED,
    STATE,
    WIDTH,
)
from recipes.nano.nano_model.training import lengths
from recipes.nano.nano_model.training.answering import answer
from recipes.nano.nano_model.training.dropout import channel_gains
from recipes.nano.nano_model.training.forward import FastModel, Side, Text, rounded, visible
from recipes.nano.nano_model.training.loop import Plan, rate_at
from recipes.nano.nano_model.training.measures import is_about, prompts_of, score
from recipes.nano.nano_model.training.openings import WEIGHT, opening_weights
from recipes.nano.nano_model.training.parts import (
    SharedWeights,
    factor_of,
    keep_exact_gradients,
    keep_sinks_silent,
    parameter_groups,
)
from recipes.nano.nano_model.training.plain import make_plain
from recipes.nano.nano_model.vocabulary import QUOTE, TURN_END

RECIPE = Path(__file__).parents[3] / "recipes" / "nano"


def tone(seconds: float, seed: int) -> np.ndarray:
    """Noise with a slow swell."""
    rng = np.random.default_rng(seed)
    count = int(seconds * 16000)
    return (0.1 * rng.standard_normal(count) * np.sin(np.arange(count) / 4000) ** 2).astype(np.float32)


@pytest.fixture(scope="module")
def batch(nano: tuple[Any, Any]) -> Batch:
    """Conversations of one turn, of two, with two clips and with none."""
    model, processor = nano
    text = lambda words: {"type": "text", "text": words}  # noqa: E731
    clip = lambda seconds, seed: {"type": "audio", "audio": tone(seconds, seed)}  # noqa: E731
    reply = lambda words: {"role": "assistant", "content": [text(words)]}  # noqa: E731
    user = lambda *parts: {"role": "user", "content": list(parts)}  # noqa: E731
    conversations = [
        [user(text("Transcribe it."), clip(2, 0)), reply('The spoken content of the audio is "Hi there.".')],
        [
            user(text("What is this sound?"), clip(3, 1)), reply("This is the sound of rain or noise."),
            user(text("Why?")), reply("I hear a steady hiss."),
        ],
        [user(text("Which clip is longer?"), clip(1, 2), clip(2, 3)), reply("The second clip is longer.")],
        [user(text("What is the capital of France?")), reply("The capital of France is Paris.")],
    ]  # fmt: skip
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, output_labels="assistant", padding_side="right"
    )
    with torch.no_grad():
        rows = model.model.audio_tower(inputs["input_features"], inputs["input_features_mask"]).audio_tokens
    return Batch(
        ids=[],
        audio_s=8.0,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=inputs["labels"],
        answer_weights=torch.ones(len(conversations)),
        audio_rows=rows,
    )


def test_text_tokens_alone_give_the_models_logits(nano, batch):
    model, _ = nano
    with torch.no_grad():
        logits, labels, _ = FastModel(model).logits(batch)
        embeds = model.model.multi_modal_projector(batch.audio_rows)
        states = model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, audio_embeds=embeds
        ).last_hidden_state
        expected = model.lm_head(states)[:, :-1][batch.labels[:, 1:] != -100]
    assert (labels == batch.labels[:, 1:][batch.labels[:, 1:] != -100]).all()
    assert (logits - expected).abs().mean() < 0.02
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97


def test_answers_are_those_of_generate(nano, batch):
    model, processor = nano
    prompts = prompts_of(batch)
    ends = tuple(model.generation_config.eos_token_id)
    found = answer(FastModel(model), prompts, 12, ends)
    question = {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}
    inputs = processor.apply_chat_template(
        [question], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    expected = model.generate(**inputs, max_new_tokens=12, num_beams=1)[
        0, inputs.input_ids.shape[1] :
    ].tolist()
    assert found[3] == [token for token in expected if token not in ends]


def test_prompts_end_where_the_last_answer_starts(nano, batch):
    prompts = prompts_of(batch)
    for row in range(4):
        length = int(prompts.attention_mask[row].sum())
        assert batch.labels[row, length] != -100
        assert batch.labels[row, length - 1] == -100


def test_a_token_sees_what_is_not_after_it():
    text = Side.of(torch.tensor([[True, False, True, True], [False, True, False, False]]))
    audio = Side.of(torch.tensor([[False, True, False, False], [True, False, False, False]]))
    assert text.shape == (2, 3)
    assert (visible(text, audio)[0, 0] == 0).tolist() == [[False], [True], [True]]
    assert (visible(text, text)[0, 0] == 0).tolist() == [
        [True, False, False],
        [True, True, False],
        [True] * 3,
    ]
    x = torch.arange(8.0).view(4, 2)
    assert torch.equal(text.gather(text.spread(x, 1)), x)


def test_an_opening_that_all_rows_share_is_computed_once():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8], [5, 6, 7, 0]])
    text = Text.of(ids, torch.tensor([[True] * 4, [True] * 4, [True, True, True, False]]))
    assert text.side.rows[text.first].tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert text.side.positions[text.first].tolist() == [0, 1, 2, 3, 2, 3, 2]
    assert text.copies.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 6]
    x = torch.arange(14.0).view(7, 2)
    spread = text.spread(x, 1)
    assert torch.equal(spread[1, 0, :2], x[:2])
    assert torch.equal(text.gather(spread), x)


def test_masks_flags_and_layer_0_stay_as_they_are(nano, batch):
    model, _ = nano
    groups = parameter_groups(model)
    assert all(group["factor"] > 0 for group in groups)
    loss, figures = FastModel(model, noise=1.0).loss(batch, 0.01)
    loss.backward()
    keep_exact_gradients(model)
    layers = model.model.language_model.layers
    assert all(parameter.grad is None for parameter in layers[0].parameters())
    assert all(parameter.grad is None for parameter in model.model.audio_tower.parameters())
    assert layers[1].self_attn.q_proj.weight.grad[[31, 63]].abs().max() == 0
    assert layers[1].self_attn.q_proj.weight.grad.abs().max() > 0
    assert layers[2].self_attn.o_proj.weight.grad[CONST].abs().max() == 0
    assert model.model.language_model.embed_tokens.weight.grad is None
    assert layers[3].mlp.gate_proj.weight.grad[:, [AUDIO, SINK]].abs().max() == 0
    keep_sinks_silent(model)
    value = layers[4].self_attn.v_proj
    torch.testing.assert_close(value.weight[:, SINK] * SINK_NORMED, -value.bias)
    assert figures["labels"] == int((batch.labels != -100).sum())
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def test_a_shipped_model_is_trained_at_the_size_that_it_was_constructed_with(batch):
    model: Any = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32)
    model.double()  # layer 0's large scores make differences of .004 out of float32's rounding
    with torch.inference_mode():
        before = FastModel(model).logits(batch)[0]
        make_plain(model)
        after = FastModel(model).logits(batch)[0]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert model.config.text_config.rms_norm_eps == EPS
    norms = [
        parameter
        for name, parameter in model.named_parameters()
        if "language_model" in name and "norm" in name
    ]
    assert len(norms) == 2 * NUM_LAYERS + 1
    assert all((norm == 1).all() for norm in norms)
    flags = model.get_input_embeddings().weight[:, CONST]
    assert float(flags.max()) == pytest.approx(FLAG, rel=1e-3)


def test_rounding_noise_is_that_of_eight_bits():
    x = torch.randn(4, 1000)
    assert rounded(x, 0.0) is x
    step = x.abs().amax(-1) / 127
    error = (rounded(x, 1.0) - x).abs().amax(-1)
    assert ((error > 0.4 * step) & (error <= 0.5 * step + 1e-6)).all()


def test_states_of_other_text_that_grow_are_charged_for_and_transcripts_are_not():
    x = torch.zeros(3, WIDTH)
    x[:, 0] = torch.tensor([2 * lengths.LONGEST[3], 0.5 * lengths.LONGEST[3], 1000.0])
    x[:2, OPEN] = MARK
    x.requires_grad_()
    charge = lengths.excess(x, 3)
    charge.backward()
    assert float(charge) == pytest.approx(math.log(2) ** 2 / 2)
    assert x.grad is not None
    assert x.grad[0, 0] > 0
    assert x.grad[1:].abs().max() == 0
    assert lengths.excess(x[2:], 3) == 0


def test_the_loss_holds_the_charge(nano, batch):
    fast = FastModel(nano[0])
    with torch.no_grad():
        total, figures = fast.loss(batch)
    assert float(total) == pytest.approx(figures["loss"] + figures["too_long"], rel=1e-5)


def test_learning_rates():
    plan = Plan(minutes=10, learning_rate=1.0, warmup_steps=10, fall_share=0.5)
    assert rate_at(plan, 0, 0.0) == pytest.approx(0.1)
    assert rate_at(plan, 100, 0.4) == 1.0
    assert rate_at(plan, 100, 0.75) == pytest.approx(0.5)
    assert rate_at(plan, 100, 1.0) == 0.0
    assert factor_of("model.language_model.layers.0.mlp.up_proj.weight") == 0
    assert factor_of("model.language_model.layers.4.mlp.up_proj.weight") == 1
    assert factor_of("model.language_model.layers.4.self_attn.o_proj.weight") == 0.1


def test_weights_that_transcripts_use_take_their_share_of_a_step():
    model: Any = AudioFlamingo3ForConditionalGeneration.from_pretrained("nano", dtype=torch.float32)
    groups = parameter_groups(model)
    optimizer = torch.optim.SGD(groups, lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    with SharedWeights(model, 0.04, self_share=0.5).held_back():
        optimizer.step()
    steps = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    layers = "model.language_model.layers"
    torch.testing.assert_close(steps[f"{layers}.3.mlp.gate_proj.weight"].mean(), torch.tensor(1.0))
    assert float(steps[f"{layers}.3.self_attn.q_proj.weight"][:, :STATE].mean()) == pytest.approx(
        0.5, rel=1e-3
    )
    query = steps[f"{layers}.2.self_attn.q_proj.weight"]
    torch.testing.assert_close(query[:, [HEADER, OPEN, ANSWER]].mean(), torch.tensor(1.0))
    torch.testing.assert_close(query[:, :STATE].mean(), torch.tensor(0.04), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        steps[f"{layers}.2.mlp.down_proj.weight"].mean(), torch.tensor(0.04), rtol=1e-3, atol=1e-4
    )
    assert steps[f"{layers}.0.mlp.up_proj.weight"].abs().max() == 0
    assert not SharedWeights(model, 1.0).rates


def make_row(question: str, reference: str, duration_s: float = 3.0) -> DataRow:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reference}]
    return DataRow("a", messages, (), duration_s, "here")


def test_scores():
    transcript = make_row("Transcribe it.", 'The spoken content of the audio is "Go on, please.".')
    item = score(transcript, 'The spoken content of the audio is "go on pleas".')
    assert (item.num_errors, item.num_words, item.is_right) == (1, 3, False)
    silence = make_row("Transcribe it.", 'The spoken content of the audio is "".')
    assert score(silence, 'The spoken content of the audio is "".').is_right
    choice = make_row("What is it? (A) rain (B) wind", "wind")
    assert score(choice, "(B) wind").is_right
    assert not score(choice, "rain").is_right
    assert score(make_row("Is it speech?", "Yes, someone is speaking."), "yes someone is speaking").is_right
    no = make_row("Is it speech?", "No, there is no speech in this clip.")
    assert score(no, "There is no speech in this clip.").is_right
    assert not score(no, "Yes, there is speech in this clip.").is_right
    described = make_row("Describe it.", 'A man is speaking and he says "Go on, please, to the end of it.".')
    assert score(described, 'A man is speaking and he says "go on, please, to the end of id".').is_right
    assert not score(described, 'A man is speaking and he says "to the end".').is_right
    assert not score(
        described, 'A woman is speaking and she says "Go on, please, to the end of it.".'
    ).is_right
    unsure = make_row("Describe it.", 'Someone is speaking, and they say "Go on, please.".')
    assert score(unsure, 'A woman is speaking and she says "Go on, please.".').is_right
    assert not score(unsure, 'Look for it in these words: "Go on, please.".').is_right
    assert not score(described, "").is_right
    assert is_about("It lasts about ten seconds.", 11.5)
    assert not is_about("It lasts about ten seconds.", 14.0)
    assert not is_about("I do not know.", 14.0)


def test_the_command_trains_and_goes_on(tmp_path):
    """With rows without audio, which need neither clips nor Whisper."""
    text = lambda role, words: {"role": role, "content": [{"type": "text", "text": words}]}  # noqa: E731
    rows = [
        {"id": f"{number}", "messages": [text("user", f"Say {number}."), text("assistant", f"{number}.")]}
        for number in range(20)
    ]
    (tmp_path / "train_text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mixture.json").write_text(json.dumps([["transcription", 1, 1.0], ["text", 1, 1.0]]))
    command = [sys.executable, str(RECIPE / "train_model.py"), "--data-dir", str(tmp_path), "--start", "nano"]
    command += ["--mixture", str(tmp_path / "mixture.json"), "--batch", "60", "--threads", "1"]
    steps = []
    for minutes in ("0.01", "0.1"):
        done = subprocess.run([*command, "--minutes", minutes], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        steps.append(int(re.search(r"(\d+) steps in", done.stdout)[1]))
    assert 0 < steps[0] < steps[1]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_an_answer_counts_more_up_to_its_quote():
    quote, end = 7, 9
    labels = torch.tensor([1, 2, quote, 3, 3, end, 4, end, 1, quote, 5, 4, end])
    rows = torch.tensor([0] * 8 + [1] * 5)
    found = opening_weights(labels, rows, quote, end)
    expected = [WEIGHT] * 3 + [1.0] * 3 + [WEIGHT] * 2 + [WEIGHT] * 2 + [1.0] * 3
    assert found.tolist() == expected


def test_the_openings_of_real_answers_count_more(nano, batch):
    """Every answer of a batch, one that quotes included, starts with the weight and ends without it if it quotes."""
    model, processor = nano
    quote, end = processor.tokenizer.convert_tokens_to_ids([QUOTE, TURN_END])
    with torch.no_grad():
        _, labels, rows = FastModel(model).logits(batch)
    found = opening_weights(labels, rows, quote, end)
    for row in rows.unique().tolist():
        mine = rows == row
        assert found[mine][0] == WEIGHT
        assert (found[mine][-1] == 1.0) == bool((labels[mine] == quote).any())
    assert (found == 1.0).any()
    assert (found == WEIGHT).any()


def test_channels_are_dropped_where_no_words_are_quoted():
    quote = 7
    input_ids = torch.tensor([[1, quote, 2], [1, 2, 3]])
    gains = channel_gains(input_ids, quote, 0.2)
    assert (gains[0] == 1).all()
    assert set(gains[1].tolist()) == {0.0, 1.25}
    assert 0.1 < float((gains[1] == 0).float().mean()) < 0.3


def test_dropped_channels_change_their_own_rows_alone(nano, batch):
    model, processor = nano
    quote = processor.tokenizer.convert_tokens_to_ids(QUOTE)
    gains = channel_gains(batch.input_ids, quote, 0.2)
    is_quoting = (batch.input_ids == quote).any(1)
    has_audio = (batch.input_ids == model.config.audio_token_id).any(1)
    with torch.no_grad():
        before, _, rows = FastModel(model).logits(batch)
        after, *_ = FastModel(model).logits(batch, gains=gains)
    for row in range(len(is_quoting)):
        change = float((after - before)[rows == row].abs().max())
        assert (change > 0.05) == bool(has_audio[row] and not is_quoting[row])
