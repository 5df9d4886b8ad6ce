"""The model's own equivalences: batch = alone, cached = full, padding changes nothing, gradients everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from audioflamingo.errors import ArgumentError, ContextLengthError, PromptError
from audioflamingo.network.loss import LOSS_CHUNK, causal_lm_loss
from tests.support.tiny_model import AUDIO_TOKEN_ID, make_batch, tiny_model, tokens_of

# 0.5 s, 31 s, 95 s and text only: the lengths that P1 asks for.
MIXED_ROWS = [([50], 5), ([3000, 100], 9), ([3000, 3000, 3000, 500], 4), ([], 12)]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def row_alone(batch, row, num_windows_before, num_windows):
    """One row of a batch without its padding, as a batch of its own."""
    real = batch["attention_mask"][row].bool()
    alone = {"input_ids": batch["input_ids"][row : row + 1, real]}
    if num_windows:
        windows = slice(num_windows_before, num_windows_before + num_windows)
        alone["input_features"] = batch["input_features"][windows]
        alone["input_features_mask"] = batch["input_features_mask"][windows]
    return alone


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_each_row_of_a_batch_equals_the_row_alone(model, padding_side) -> None:
    """P1, P2: audio rows were once matched to the wrong sample, and padding leaked."""
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        rows = [MIXED_ROWS[i] for i in order]
        batch = make_batch(rows, padding_side)
        logits = model(**batch).logits
        before = 0
        for row, (windows, _) in enumerate(rows):
            alone = model(**row_alone(batch, row, before, len(windows))).logits[0]
            torch.testing.assert_close(
                logits[row][batch["attention_mask"][row].bool()], alone, atol=TOLERANCE, rtol=0
            )
            before += len(windows)


@torch.no_grad()
def test_two_clips_give_different_logits(model) -> None:
    """P14: audio was once silently ignored."""
    first, second = make_batch([([500], 5)], seed=1), make_batch([([500], 5)], seed=1)
    second["input_features"] = second["input_features"].flip(0, 2)
    assert (model(**first).logits - model(**second).logits).abs().max() > 1e-3


@torch.no_grad()
def test_padding_in_the_middle_counts_as_padding(model) -> None:
    ids = torch.tensor([[11, 12, 13, 14]])
    gaps = torch.tensor([[0, 11, 0, 12, 13, 0, 14]])
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1]])
    with_gaps = model(gaps, attention_mask=mask).logits[0, mask[0].bool()]
    torch.testing.assert_close(with_gaps, model(ids).logits[0], atol=TOLERANCE, rtol=0)
    assert not model(gaps, attention_mask=mask).logits[0, ~mask[0].bool()].any()


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("cuts", [[1], [700], [3, 3, 500]])
def test_cached_equals_full(model, padding_side, cuts) -> None:
    """The prompt in one piece equals the prompt in pieces, whatever the padding of each piece."""
    batch = make_batch([([2800], 9), ([50], 700), ([], 705)], padding_side)
    full = model(**batch).logits
    ids, mask = batch["input_ids"], batch["attention_mask"]
    embeds = model.model._merge(
        ids,
        model.get_input_embeddings()(ids),
        model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output,
    )
    # Every piece must hold a real token of every row.
    start = int(mask.argmax(-1).max()) + 1 if padding_side == "left" else 1
    ends = [start + sum(cuts[: i + 1]) for i in range(len(cuts))]
    ends = [end for end in ends if end < int(mask.sum(-1).min())] + [ids.shape[1]]
    cache = None
    position = 0
    for end in [start, *ends]:
        if not mask[:, position:end].any(-1).all():
            break
        out = model(
            inputs_embeds=embeds[:, position:end],
            attention_mask=mask[:, position:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        real = mask[:, position:end].bool()
        torch.testing.assert_close(out.logits[real], full[:, position:end][real], atol=TOLERANCE, rtol=0)
        position = end
    assert position > start


@torch.no_grad()
def test_a_cache_goes_on_behind_each_rows_own_end(model) -> None:
    for side in ("left", "right"):
        batch = make_batch([([500], 5), ([], 9), ([50], 30)], side)
        cache = model.new_cache(3, 500)
        model(**batch, past_key_values=cache, logits_to_keep=1)
        assert cache.lengths == batch["attention_mask"].sum(-1).tolist()
        step = model(torch.tensor([[1], [2], [3]]), past_key_values=cache).logits[:, 0]
        for row in range(3):
            alone = row_alone(batch, row, int(row == 2), int(row != 1))
            alone["input_ids"] = torch.cat([alone["input_ids"], torch.tensor([[row + 1]])], 1)
            torch.testing.assert_close(step[row], model(**alone).logits[0, -1], atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_takes_float32_features(dtype) -> None:
    """P3, P4: the model casts its float inputs, and no block goes back to float32."""
    model = tiny_model().to(dtype)
    seen = []
    hooks = [m.register_forward_hook(lambda _m, _i, out: seen.append(out)) for m in model.modules()]
    out = model(**make_batch([([400], 6), ([], 3)]))
    for hook in hooks:
        hook.remove()
    tensors = [t for t in seen if isinstance(t, torch.Tensor)]
    tensors += [t for o in seen if isinstance(o, tuple) for t in o if isinstance(t, torch.Tensor)]
    assert len(tensors) > 30
    assert {t.dtype for t in tensors} == {dtype}
    assert out.logits.dtype == dtype
    assert out.logits.isfinite().all()


def test_gradients_reach_every_trained_parameter() -> None:
    """P19: also with a window that is nearly empty."""
    model = tiny_model().train()
    batch = make_batch([([3000, 3], 6), ([3], 4)], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels.masked_fill(labels == AUDIO_TOKEN_ID, -100)).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("embed_positions.weight"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch = make_batch([([300], 6), ([40], 9)], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for enable in (False, True):
        model = tiny_model().train()
        if enable:
            model.gradient_checkpointing_enable()
        model(**batch, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_a_cache_changes_no_gradient_of_what_it_takes_in() -> None:
    """Stored keys and values are constants; those of the call that stores them must still learn."""
    batch = make_batch([([300], 6), ([40], 9)], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for use_cache in (False, True):
        model = tiny_model().train()
        model(**batch, labels=labels, use_cache=use_cache).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_loss_in_chunks_equals_loss_at_once() -> None:
    """P21: logits for every position need not exist at one time."""
    head = torch.nn.Linear(8, 300, bias=False)
    hidden = torch.randn(2, LOSS_CHUNK + 40, 8, requires_grad=True)
    labels = torch.randint(0, 300, hidden.shape[:2])
    labels[0, :700] = -100
    loss = causal_lm_loss(hidden, labels, head)
    expected = torch.nn.functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, head.weight)[0],
        torch.autograd.grad(expected, head.weight)[0],
        atol=1e-6,
        rtol=1e-4,
    )


@torch.no_grad()
def test_logits_to_keep_and_deferred_logits(model) -> None:
    batch = make_batch([([300], 6), ([40], 9)])
    full = model(**batch).logits
    assert torch.equal(model(**batch, logits_to_keep=0).logits, full)
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, full[:, -2:], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        model(**batch, logits_to_keep=torch.tensor([3, 7])).logits, full[:, [3, 7]], atol=1e-6, rtol=0
    )
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    out = model(**batch, labels=batch["input_ids"])
    in_loss = len(calls)
    torch.testing.assert_close(out.logits, full, atol=1e-6, rtol=0)
    assert len(calls) == in_loss + 1
    assert out.logits is out["logits"]
    hook.remove()
    for wrong in (-1, 1.5, True):
        with pytest.raises(ArgumentError, match="logits_to_keep"):
            model(**batch, logits_to_keep=wrong)


@torch.no_grad()
def test_outputs_read_by_name_key_and_position(model) -> None:
    out = model(torch.tensor([[1, 2]]), use_cache=True, output_hidden_states=True)
    assert out["logits"] is out.logits
    assert out[0] is out.logits
    assert out.keys() == ["logits", "past_key_values", "hidden_states"]
    assert len(out.hidden_states) == 3
    with pytest.raises(KeyError, match="holds"):
        out["loss"]


@torch.no_grad()
def test_eager_equals_sdpa_and_gives_weights(model) -> None:
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    batch = make_batch([([300], 6), ([40], 9), ([], 3)])
    out = eager(**batch, output_attentions=True)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits, model(**batch).logits, atol=TOLERANCE, rtol=0)
    assert out.attentions[0].shape == (3, 4, *real.shape[1:], real.shape[1])
    for weights, mask in zip(out.attentions[1], real, strict=True):
        torch.testing.assert_close(weights.sum(-1), mask.float().expand(4, -1), atol=1e-5, rtol=0)
        assert not weights[:, :, ~mask].any()
    with pytest.raises(ArgumentError, match="eager"):
        model(**batch, output_attentions=True)
    with pytest.raises(ArgumentError, match="flash"):
        model.set_attn_implementation("flash")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda b: b["input_ids"].__setitem__((0, -1), AUDIO_TOKEN_ID),
            PromptError,
            "13 <sound> tokens.*12 vectors",
        ),
        (lambda b: b.pop("input_features"), PromptError, "12 <sound> tokens.*0 vectors"),
        (lambda b: b.pop("input_ids"), ArgumentError, "either input_ids or inputs_embeds"),
        (lambda b: b.update(inputs_embeds=torch.zeros(1, 5, 48)), ArgumentError, "not both"),
        (lambda b: b.update(attention_mask=torch.ones(1, 3)), ArgumentError, "attention_mask"),
        (lambda b: b.update(attention_mask=torch.zeros(1, 17)), ArgumentError, "no token as real"),
        (lambda b: b.update(position_ids=torch.zeros(1, 3)), ArgumentError, "position_ids"),
        (lambda b: b.update(labels=torch.zeros(1, 3)), ArgumentError, "labels"),
        (lambda b: b.update(labels=torch.full((1, 17), -100)), ArgumentError, "nothing to learn"),
        (
            lambda b: b.update(input_features=torch.zeros(1, 80, 3000)),
            ArgumentError,
            r"\(windows, 128, frames\)",
        ),
        (
            lambda b: b.update(input_features=torch.zeros(128, 3000)),
            ArgumentError,
            r"\(windows, 128, frames\)",
        ),
        (lambda b: b.update(input_features=torch.zeros(1, 128, 3001)), ArgumentError, "3001 frames"),
        (lambda b: b.update(input_features_mask=torch.ones(1, 9)), ArgumentError, "input_features_mask"),
        (lambda b: b["input_features_mask"].__setitem__((0, 0), 0), ArgumentError, "ones first"),
        (lambda b: b.update(input_feature=torch.zeros(1)), ArgumentError, "did you mean 'input_features'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, change, error, message) -> None:
    batch = make_batch([([50], 5)])
    assert batch["input_ids"].shape[1] == 5 + tokens_of(50) == 17
    change(batch)
    with pytest.raises(error, match=message):
        model(**batch)


def test_context_is_limited() -> None:
    model = tiny_model(max_position_embeddings=16)
    with pytest.raises(ContextLengthError, match="17 tokens are more than the model's context of 16"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ContextLengthError, match="holds 4"):
        model(torch.ones(1, 5, dtype=torch.long), past_key_values=model.new_cache(1, 4))


@torch.no_grad()
def test_position_ids_are_used(model) -> None:
    ids = torch.tensor([[5, 6, 7]])
    shifted = model(ids, position_ids=torch.arange(3)[None] * 5).logits
    assert (shifted - model(ids).logits).abs().max() > 1e-4
    torch.testing.assert_close(
        model(ids, position_ids=torch.arange(3)[None] + 9).logits, model(ids).logits, atol=1e-4, rtol=0
    )
