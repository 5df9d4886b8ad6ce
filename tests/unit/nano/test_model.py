"""The construction of the built-in model: each part does what Whisper's does, or says by how much it does not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from recipes.nano.nano_model import (
    answers,
    assemble,
    attention,
    counting,
    equalize,
    masks,
    mlp,
    positions,
    vocabulary,
    words,
)
from recipes.nano.nano_model import layout as at
from recipes.nano.nano_model.whisper import Attention, DecoderLayer, Whisper, attend
from recipes.nano.nano_model.whisper import mlp as whisper_mlp

KINDS = ("transcript", "header", "audio", "sink", "assistant")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random_attention(rank: int = 50, size: float = 0.06) -> Attention:
    """Scores of each head have few directions, as the model has room for."""

    def narrow() -> torch.Tensor:
        keep = torch.cat([torch.ones(rank), torch.zeros(at.HEAD - rank)]).repeat(at.HEADS)
        return size * torch.randn(at.STATE, at.STATE) * keep[:, None]

    bias = lambda: 0.3 * torch.randn(at.STATE)  # noqa: E731
    full = lambda: size * torch.randn(at.STATE, at.STATE)  # noqa: E731
    return Attention(narrow(), bias(), narrow(), full(), bias(), full(), bias())


def random_norm() -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + 0.3 * torch.randn(at.STATE), 0.2 * torch.randn(at.STATE)


def scores_of(layer: at.Layer, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores (H, T, L) of normed tokens, without rotation."""
    q, k = queries @ layer.q.T + layer.bq, keys @ layer.k.T + layer.bk
    q, k = (x.unflatten(-1, (at.HEADS, at.HEAD)).transpose(0, 1) for x in (q, k))
    return q @ k.transpose(1, 2) / math.sqrt(at.HEAD)


def run_attention(
    layer: at.Layer, x: torch.Tensor, keys: torch.Tensor | None = None, eps: float = at.EPS
) -> torch.Tensor:
    """What a layer's attention adds to a stream (T, WIDTH), rotated by position and causal, in the stream's dtype."""
    normed = at.rms_norm(x.float(), eps).to(x.dtype)
    heard = normed if keys is None else at.rms_norm(keys)
    turns = at.THETA ** (-torch.arange(at.HEAD // 2) / (at.HEAD / 2))

    def heads(y: torch.Tensor, is_turned: bool) -> torch.Tensor:
        y = y.unflatten(-1, (at.HEADS, at.HEAD))
        if is_turned:
            angles = torch.arange(len(y))[:, None, None] * turns
            first, second = y.chunk(2, -1)
            cos, sin = angles.cos().to(y.dtype), angles.sin().to(y.dtype)
            y = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return y.transpose(0, 1)

    is_turned = keys is None
    q = heads(normed @ layer.q.T + layer.bq, is_turned)
    k, v = heads(heard @ layer.k.T + layer.bk, is_turned), heads(heard @ layer.v.T + layer.bv, False)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_turned)
    return out.transpose(0, 1).flatten(1) @ layer.o.T


def tokens_of(kind: str, count: int, mark: float) -> torch.Tensor:
    """Normed tokens (N, WIDTH) of a kind, with a HEADER and OPEN of `mark`."""
    x = torch.zeros(count, at.WIDTH)
    if kind == "audio":
        x[:, : at.STATE], x[:, at.AUDIO] = torch.randn(count, at.STATE), at.AUDIO_FLAG
        return at.rms_norm(x)
    if kind == "sink":
        x[:, at.SINK] = at.SINK_SIZE
        return at.rms_norm(x)
    x[:, : at.STATE] = torch.randn(count, at.STATE)
    x = at.rms_norm(x)
    x[:, at.CONST] = 1
    if kind == "header":
        x[:, [at.HEADER, at.OPEN]] = mark
    if kind == "assistant":
        x[:, at.START] = 1
    return x


# norms


def test_a_centred_state_is_normed_as_by_layer_norm():
    state = torch.randn(5, at.STATE) * 0.3 + 0.1
    gain, bias = random_norm()
    x = torch.zeros(5, at.WIDTH)
    x[:, : at.STATE] = at.centred(state)
    normed = at.rms_norm(x)[:, : at.STATE] * assemble.SCALE
    torch.testing.assert_close(
        normed * gain + bias, F.layer_norm(state, (at.STATE,), gain, bias), atol=1e-3, rtol=1e-3
    )


# rotary


def test_content_does_not_turn_over_the_distances_that_occur():
    turns = [at.THETA ** (-2 * (dim % (at.HEAD // 2)) / at.HEAD) for dim in at.CONTENT]
    assert max(turns) * 100 < 0.07  # a transcript
    turns = [at.THETA ** (-2 * (dim % (at.HEAD // 2)) / at.HEAD) for dim in attention.CROSS_CONTENT]
    assert max(turns) * 750 < 0.05  # a clip of 30 s
    assert torch.tensor(at.THETA, dtype=torch.float32).isfinite()


def test_sizes_are_such_that_groups_of_int4_divide_them():
    from audioflamingo.kernels import INT4_GROUPS

    for size in (at.WIDTH, at.HEADS * at.HEAD, at.INNER):
        assert size % min(INT4_GROUPS) == 0
    assert at.HEADS * at.HEAD % 64 == at.INNER % 64 == 0


# masks


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("transcript", {"transcript", "assistant"}),
        ("header", {"transcript", "header"}),
        ("audio", {"sink"}),
        ("sink", {"sink"}),
    ],
)
def test_who_looks_at_whom_in_a_self_layer(kind, seen):
    layer = at.Layer()
    masks.mask_self(layer, mark_normed=3.0, start_normed=1.0)
    keys = torch.cat([tokens_of(other, 4, 3.0) for other in KINDS])
    scores = scores_of(layer, tokens_of(kind, 3, 3.0), keys)
    shares = scores.softmax(-1).unflatten(-1, (len(KINDS), 4)).sum(-1)  # (H, 3, kinds)
    for place, other in enumerate(KINDS):
        assert (shares[..., place].min() > 0.1) if other in seen else (shares[..., place].max() < 1e-6)


@pytest.mark.parametrize("longer", [1, 3, 30])
def test_other_text_does_not_find_assistant_however_long_its_state_becomes(longer):
    """It is the first token of a transcript, which in Whisper grows far beyond all others."""
    states = torch.randn(20, at.STATE)
    states[0] *= longer
    layer = at.Layer()
    masks.mask_self(layer, mark_normed=3.0, start_normed=assemble.start_normed(states))
    assistant = torch.zeros(1, at.WIDTH)
    assistant[0, : at.STATE], assistant[0, at.START] = states[0], at.FLAG
    keys = torch.cat([tokens_of("header", 1, 3.0), at.rms_norm(assistant)])
    scores = scores_of(layer, tokens_of("header", 3, 3.0), keys)
    assert (scores[..., 0] - scores[..., 1]).min() > 1.5 * masks.SELF_MARGIN


def test_in_a_cross_layer_text_looks_at_audio_and_audio_at_sinks():
    layer = at.Layer()
    masks.mask_cross(layer)
    keys = torch.cat([tokens_of(other, 4, 3.0) for other in KINDS])
    for kind, target in (("transcript", 2), ("header", 2), ("audio", 3), ("sink", 3)):
        shares = (
            scores_of(layer, tokens_of(kind, 3, 3.0), keys).softmax(-1).unflatten(-1, (len(KINDS), 4)).sum(-1)
        )
        assert shares[..., target].min() > 1 - 1e-6


def test_no_layer_changes_audio_or_sinks():
    layer = at.Layer()
    layer.v, layer.bv, layer.o = (
        torch.randn_like(layer.v),
        torch.randn_like(layer.bv),
        torch.randn_like(layer.o),
    )
    layer.gate, layer.up, layer.down = (torch.randn_like(x) / 20 for x in (layer.gate, layer.up, layer.down))
    masks.mask_self(layer, 3.0, 1.0)
    masks.keep_audio(layer)
    sink, audio = tokens_of("sink", 1, 3.0), tokens_of("audio", 4, 3.0)
    added = run_attention(layer, torch.cat([sink, audio]))
    assert added.abs().max() < 1e-4
    assert mlp.output(layer, torch.cat([sink, audio])).abs().max() < 1e-3


# attention


@pytest.mark.parametrize("is_cross", [False, True])
def test_attention_is_whispers(is_cross):
    part, norm, encoder_norm = random_attention(), random_norm(), random_norm()
    states, const = at.centred(0.2 * torch.randn(600, at.STATE)), 0.4
    text = assemble.stream(states, const)
    frames = F.layer_norm(torch.randn(500, at.STATE), (at.STATE,))
    heard = torch.zeros(500, at.WIDTH)
    heard[:, : at.STATE], heard[:, at.AUDIO] = frames, at.AUDIO_FLAG
    key_norm, scale = (encoder_norm, at.AUDIO_RMS) if is_cross else (norm, assemble.SCALE)
    folded = attention.fold(part, norm, key_norm, scale, assemble.SCALE)
    seen = attention.Seen(text, at.rms_norm(heard) if is_cross else text)
    layer = at.Layer()
    left_out = attention.put_attention(layer, folded, seen, 0.1, is_cross)
    assert left_out < 1e-6
    x = torch.zeros(20, at.WIDTH)
    x[:, : at.STATE], x[:, at.CONST] = states[:20], const
    normed = F.layer_norm(states[:20], (at.STATE,), *norm)
    if is_cross:
        wanted = attend(part, normed, frames[:50] * encoder_norm[0] + encoder_norm[1])
        added = run_attention(layer, x, heard[:50])
    else:
        wanted, added = attend(part, normed, normed, is_causal=True), run_attention(layer, x)
    error = (added[:, : at.STATE] - at.centred(wanted)).pow(2).mean() / at.centred(wanted).pow(2).mean()
    assert error < 0.01
    torch.testing.assert_close(added[:, at.CONST], torch.full((20,), 0.1), atol=0.02, rtol=0)


# MLP


def random_layer() -> DecoderLayer:
    norms = (random_norm(), random_norm(), random_norm())
    fc1, fc2 = 0.05 * torch.randn(4 * at.STATE, at.STATE), 0.02 * torch.randn(at.STATE, 4 * at.STATE)
    fc2[:, at.INNER - 1 :] *= 0.01  # as many strong neurons as there is room for
    biases = 0.5 * torch.randn(4 * at.STATE), 0.1 * torch.randn(at.STATE)
    return DecoderLayer(random_attention(), random_attention(), fc1, biases[0], fc2, biases[1], norms)


def test_the_mlp_is_whispers_but_for_the_form_of_gelu_and_a_fit_improves_it():
    whisper, const = random_layer(), 0.4
    before = at.centred(0.2 * torch.randn(1500, at.STATE))
    after = before + at.centred(whisper_mlp(whisper, before))
    layer = at.Layer()
    mlp.put_neurons(layer, whisper, before, const)

    def error() -> float:
        added = mlp.output(layer, assemble.stream(before, const))[:, : at.STATE]
        return float((added - (after - before)).pow(2).mean() / (after - before).pow(2).mean())

    start = error()
    assert start < 0.05
    mlp.fit(layer, before, after, const, seconds=2.0)
    assert error() < start


# positions


@pytest.mark.parametrize(
    ("stored", "dtype", "position_error", "mark_error", "start_error"),
    [
        (torch.float32, torch.float32, 0.001, 0.1, 0.01),
        (torch.float16, torch.float32, 0.001, 0.15, 0.03),
        (torch.float16, torch.float16, 0.001, 0.15, 0.05),
        (torch.float16, torch.bfloat16, 0.02, 0.2, 0.2),
    ],
)
def test_layer_0_writes_the_positions_of_a_transcript_and_the_marks_of_other_text(
    stored, dtype, position_error, mark_error, start_error
):
    table, quote = 0.014 * torch.randn(448, at.STATE), 9
    embedding = torch.zeros(50, at.WIDTH)
    embedding[:, : at.STATE], embedding[:, at.CONST] = at.centred(0.02 * torch.randn(50, at.STATE)), at.FLAG
    for token, flag, length in (
        (1, at.START, 0.63),
        (45, at.QUOTE, 0.295),
    ):  # of Whisper's two opening tokens
        embedding[token] *= length / embedding[token].norm()
        embedding[token, [at.CONST, flag]] = at.FLAG
        embedding[token] = assemble.at_exact_length(embedding[token], flag)
    embedding[0] = 0
    embedding[0, at.SINK] = at.SINK_SIZE
    layer = positions.position_layer(embedding, table, start=1, quote=quote)
    layer.o, layer.down = layer.o * at.STREAM_FACTOR, layer.down * at.STREAM_FACTOR  # as it is shipped
    stream, eps = (embedding * at.STREAM_FACTOR).to(dtype), at.EPS * at.STREAM_FACTOR**2
    for name, tensor in vars(layer).items():
        setattr(layer, name, tensor.to(stored).to(dtype))
    text = lambda count: (2 + torch.randint(40, (count,))).tolist()  # noqa: E731
    first = [0, *text(10), 0, *text(30), 0, 1, *text(quote - 1), 45, *text(60)]
    ids = [*first, 0, *text(20), 0, 1, *text(15)]

    def written(tokens: list[int]) -> torch.Tensor:
        x = stream[tokens] + run_attention(layer, stream[tokens], eps=eps)
        out = x + mlp.output(layer, at.rms_norm(x.float(), eps).to(dtype))
        return (out - stream[tokens]).float() / at.STREAM_FACTOR

    out = written(ids)
    start = first.index(1)
    answer, wanted = out[start : len(first)], positions.answer_targets(table, quote, len(first) - start)
    own = at.centred(table)  # `assistant` and the quote stand for Whisper's two opening tokens
    torch.testing.assert_close(wanted[[0, quote, quote + 1], : at.STATE], own[[0, 1, 2]])
    error = (answer - wanted)[:, : at.STATE].pow(2).mean() / wanted[:, : at.STATE].pow(2).mean()
    assert error < position_error
    marks = [at.HEADER, at.OPEN, at.ANSWER]
    assert (answer - wanted)[:, marks].abs().max() < mark_error * at.MARK
    # every token of a transcript looks at `assistant`
    assert answer[0, marks].abs().max() < start_error * at.MARK
    question = out[[place for place in range(start) if ids[place]]]
    assert (question[:, [at.HEADER, at.OPEN]] - at.MARK).abs().max() < 0.1 * at.MARK
    between = out[len(first) + 1 : len(first) + 21]
    assert (between[:, [at.HEADER, at.OPEN]] - at.MARK).abs().max() < 0.25 * at.MARK
    later = out[-14:]  # a second answer
    assert (later[:, at.OPEN] > 0.4 * at.MARK).float().mean() > 0.6
    other = written([0, *text(10), 0, *text(30), 0, 1, *text(60)])[-60:]  # an answer that is no transcript
    assert (other[:, marks] - at.MARK).abs().max() < mark_error * at.MARK
    assert out[[place for place, token in enumerate(ids) if not token]].abs().max() < 1e-3


def test_flags_are_exact_as_they_are_stored():
    assert float(torch.tensor(at.FLAG).half()) == at.FLAG
    shipped = torch.tensor(at.FLAG * at.STREAM_FACTOR)
    assert float(shipped.to(torch.float8_e4m3fn)) == 0.5


def test_an_embedding_gets_the_length_that_makes_its_flag_exact_behind_a_norm():
    row = torch.zeros(at.WIDTH)
    row[: at.STATE], row[at.CONST], row[at.START] = 0.02 * torch.randn(at.STATE), at.FLAG, at.FLAG
    exact = assemble.at_exact_length(row, at.START)
    normed = at.rms_norm(exact)[at.START]
    assert float(normed) == pytest.approx(float(normed.bfloat16()), rel=1e-6)
    assert F.cosine_similarity(exact[: at.STATE], row[: at.STATE], 0) > 0.9999
    assert exact[at.STATE :].tolist() == row[at.STATE :].tolist()
    assert float(exact.norm()) == pytest.approx(float(row.norm()), rel=0.005)


# what other tasks start from


def test_a_question_sees_the_word_before():
    layer = at.Layer()
    answers.order_words(layer, 3.0)
    x = tokens_of("header", 30, 3.0)
    q, k = x @ layer.q.T + layer.bq, x @ layer.k.T + layer.bk
    head = slice(answers.BEFORE_HEAD * at.HEAD, (answers.BEFORE_HEAD + 1) * at.HEAD)
    angles = torch.arange(30)[:, None] * at.THETA ** (-torch.arange(at.HEAD // 2) / (at.HEAD / 2))

    def turned(y: torch.Tensor) -> torch.Tensor:
        first, second = y[:, head].chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    scores = turned(q) @ turned(k).T / 8
    scores = scores.masked_fill(torch.ones(30, 30).triu(1).bool(), -1e9)
    assert (scores[1:].argmax(-1) == torch.arange(29)).all()


def test_some_cross_heads_of_a_question_look_at_the_near_clip_and_some_at_the_far_one():
    layer = at.Layer()
    answers.order_clips(layer, 3.0)
    keys = tokens_of("audio", 300, 3.0)
    queries = torch.cat([tokens_of("header", 1, 3.0), tokens_of("transcript", 1, 3.0)])
    q, k = queries @ layer.q.T + layer.bq, keys @ layer.k.T + layer.bk
    angles = (300 - torch.arange(300)) * at.THETA ** (-answers.DISTANCE_PAIR / (at.HEAD / 2))
    for head in range(at.HEADS):
        first = head * at.HEAD + answers.DISTANCE_PAIR
        second = first + at.HEAD // 2
        scores = q[:, [first]] * (k[:, first] * angles.cos() - k[:, second] * angles.sin()) / 8
        scores = scores + q[:, [second]] * (k[:, second] * angles.cos() + k[:, first] * angles.sin()) / 8
        near = scores.softmax(-1)[:, 150:].sum(-1)  # of the second of two clips, for each query
        if head in answers.NEAR_HEADS:
            assert near[0] > 0.9
        elif head in answers.FAR_HEADS:
            assert near[0] < 0.1
        else:
            assert near[0] == pytest.approx(0.5)
        assert near[1] == pytest.approx(0.5)  # a transcript looks at all of it


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 0.02), (torch.float16, 0.02), (torch.bfloat16, 0.15)]
)
def test_layer_0_numbers_the_clips_of_a_conversation(dtype, error):
    embedding = torch.zeros(50, at.WIDTH)
    embedding[:, : at.STATE], embedding[:, at.CONST] = at.centred(0.02 * torch.randn(50, at.STATE)), at.FLAG
    for token, flag in ((1, at.START), (2, at.SYSTEM), (45, at.QUOTE)):
        embedding[token, flag] = at.FLAG
        embedding[token] = assemble.at_exact_length(embedding[token], flag)
    embedding[0] = 0
    embedding[0, at.SINK] = at.SINK_SIZE
    layer = positions.position_layer(embedding, 0.014 * torch.randn(448, at.STATE), start=1, quote=9)
    counting.count_clips(layer, float(at.rms_norm(embedding)[2, at.SYSTEM]))
    for name, tensor in vars(layer).items():
        setattr(layer, name, tensor.to(dtype))
    clip = lambda length: [-2] + (length - 1) * [-1]  # noqa: E731
    first = [0, 2, *range(3, 10), 0, *range(3, 6), *clip(40), *clip(300), *range(3, 10), 0, 1, *range(3, 30)]
    ids = torch.tensor([*first, 0, *range(3, 6), *clip(20), *range(3, 10), 0, 1])
    x = embedding[ids.clamp(min=0)]
    audio = torch.zeros(int((ids < 0).sum()), at.WIDTH)
    audio[:, : at.STATE] = F.layer_norm(torch.randn(len(audio), at.STATE), (at.STATE,))  # as the encoder ends
    audio[:, at.AUDIO] = at.AUDIO_FLAG
    audio[:, at.CLIP] = -counting.CLIP_SIZE / 2
    audio[ids[ids < 0] == -2, at.BEGIN] = counting.BEGIN_SIZE
    x[ids < 0] = audio
    added = run_attention(layer, x.to(dtype)).float()
    wanted = counting.number_code((ids == -2).cumsum(0).float())
    assert (added[:, at.CLIP] - wanted)[ids < 0].abs().max() < error
    assert added[ids >= 0, at.CLIP].abs().max() < 1e-3
    others = [place for place in range(at.WIDTH) if place != at.CLIP]
    assert added[ids < 0][:, others].abs().max() < 0.01


def test_some_cross_heads_of_a_question_look_at_the_last_clip_and_some_at_the_first():
    layer = at.Layer()
    masks.mask_cross(layer)
    counting.prefer_clips(layer, 3.0)
    audio = torch.randn(300, at.STATE)
    x = torch.cat([audio, torch.zeros(300, at.WIDTH - at.STATE)], 1)
    x[:, at.AUDIO], x[150:, at.CLIP] = at.AUDIO_FLAG, counting.CLIP_SIZE / 6
    keys = torch.cat([at.rms_norm(x), tokens_of("sink", 2, 3.0), tokens_of("header", 4, 3.0)])
    queries = torch.cat([tokens_of("header", 1, 3.0), tokens_of("transcript", 1, 3.0)])
    shares = scores_of(layer, queries, keys).softmax(-1)
    assert shares[..., :300].sum(-1).min() > 1 - 1e-6
    for head in range(at.HEADS):
        last, of_transcript = shares[head, :, 150:300].sum(-1).tolist()
        if head in answers.NEAR_HEADS:
            assert last > 0.99
        elif head in answers.FAR_HEADS:
            assert last < 0.01
        else:
            assert last == pytest.approx(0.5, abs=0.02)
        assert of_transcript == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("asked", "last"), [(-1, 0.01), (0, 0.5), (1, 0.99)])
def test_two_cross_heads_look_at_the_clip_that_a_query_asks_for(asked, last):
    layer = at.Layer()
    counting.prefer_clips(layer, 3.0)
    x = torch.zeros(300, at.WIDTH)
    x[:, : at.STATE], x[:, at.AUDIO], x[150:, at.CLIP] = torch.randn(300, at.STATE), at.AUDIO_FLAG, 1.0
    rows = [head * at.HEAD + counting.NAMING_PAIR for head in counting.NAMING_HEADS]
    assert not layer.q[rows].any()
    # As training finds a direction of the state that names a clip.
    layer.q[rows, 7] = asked * counting.QUERY_SIZE
    query = torch.zeros(1, at.WIDTH)
    query[0, 7] = 1.0
    shares = scores_of(layer, query, at.rms_norm(x)).softmax(-1)
    for head in counting.NAMING_HEADS:
        assert shares[head, 0, 150:].sum() == pytest.approx(last, abs=0.02)


def test_free_neurons_write_nothing_and_are_shut_for_transcripts():
    layer = at.Layer()
    answers.free_neurons(layer, 3.0, 1.0)
    assert mlp.output(layer, tokens_of("header", 3, 3.0)).abs().max() == 0
    gates = tokens_of("transcript", 50, 3.0) @ layer.gate.T
    assert gates.max() < -5
    assert (tokens_of("header", 50, 3.0) @ layer.gate.T).max() > 1


# vocabulary and output rows


def small_tokenizer() -> tuple[dict, dict]:
    """A tokenizer as Whisper's in form, and a template as the package's."""
    from audioflamingo.hub import BUILT_IN_FOLDER

    template = json.loads((BUILT_IN_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    letters = sorted({name for name in template["model"]["vocab"] if len(name) == 1})
    merges = [
        ("Ġ", "t"),
        ("h", "e"),
        ("Ġt", "he"),
        ("Ġ", '"'),
        ('"', "."),
        (".", '"'),
        ("c", "a"),
        ("ca", "t"),
        ("z", "z"),
    ]
    merges += [("a", "s"), ("as", "s"), ("i", "s"), ("is", "t"), ("a", "n"), ("an", "t"), ("ist", "ant")]
    names = [*letters, *("".join(merge) for merge in merges)]
    source = {
        "model": {"vocab": {name: n for n, name in enumerate(names)}, "merges": [" ".join(m) for m in merges]}
    }
    return source, template


def test_a_cut_vocabulary_holds_what_its_text_needs_and_quotes_stand_alone():
    from tokenizers import Tokenizer

    source, template = small_tokenizer()
    content, rows = vocabulary.prune(
        source, template, ["The cat saw the cat."], len(source["model"]["vocab"])
    )
    tokenizer = Tokenizer.from_str(json.dumps(content))
    known = set(content["model"]["vocab"])
    for first, second in content["model"]["merges"]:
        assert {first, second, first + second} <= known
    assert tokenizer.encode('"the cat".').tokens[-1] == vocabulary.CLOSE
    assert '."' not in known
    assert rows[-1] == -1
    assert [source["model"]["vocab"][name] for name in list(content["model"]["vocab"])[:-1]] == rows[:-1]
    assert tokenizer.decode(tokenizer.encode("The cat’s zzz!").ids) == "The cat’s zzz!"
    assert tokenizer.encode("assistant\n").tokens == [vocabulary.START, "Ċ"]


@pytest.fixture(scope="module")
def built_in_tokenizer():
    from tokenizers import Tokenizer

    from audioflamingo.hub import BUILT_IN_FOLDER

    return Tokenizer.from_file(str(BUILT_IN_FOLDER / "tokenizer.json"))


@pytest.mark.parametrize(
    "question",
    [
        'Is the word "found" said?',
        '"found": is it said?',
        'Say "yes" or "no".',
        'Who says "',
        'The spoken content of the audio is "what"?',
        "assistant: transcribe this.",
        "You are my (assistant).",
        "system: be brief.",
        "Transcribe this.\nassistant",
        "assistant",
    ],
)
@pytest.mark.parametrize("before", ["<|im_start|>user\n", "<|im_start|>user\n<sound>"])
def test_a_question_has_none_of_the_tokens_that_layer_0_goes_by(built_in_tokenizer, before, question):
    """With one of them in the question, every answer was a heap of words."""
    names = built_in_tokenizer.encode(f"{before}{question}<|im_end|>\n").tokens
    assert not {vocabulary.QUOTE, vocabulary.START, vocabulary.SYSTEM} & {*names}
    assert built_in_tokenizer.decode(built_in_tokenizer.encode(question).ids) == question


def test_roles_and_answers_have_them(built_in_tokenizer):
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>assistant\n"
    names = built_in_tokenizer.encode(text).tokens
    assert (names.count(vocabulary.SYSTEM), names.count(vocabulary.START)) == (1, 1)
    for opening in vocabulary.OPENINGS:
        names = built_in_tokenizer.encode(f'{text}{opening} "Say "no" now.".').tokens
        assert names.count(vocabulary.QUOTE) == 1


def test_frequent_words_come_back_whole_and_change_no_others():
    from tokenizers import Tokenizer

    source, template = small_tokenizer()
    cut, _ = vocabulary.prune(source, template, ["The cat saw the cat."], len(source["model"]["vocab"]))
    old = cut["model"]["vocab"]
    number = len(source["model"]["vocab"])
    source["model"]["vocab"] |= {"Ġc": number, "Ġcat": number + 1, "Ġzz": number + 2, "Ġants": number + 3}
    content, rows = words.add_words(cut, source, ["A cat, a cat and the ants."], 1)
    assert rows == [number + 1]
    assert content["model"]["vocab"]["Ġcat"] == len(old)
    assert [token["id"] for token in content["added_tokens"]] == [
        token["id"] + 1 for token in cut["added_tokens"]
    ]
    before, after = (Tokenizer.from_str(json.dumps(one)) for one in (cut, content))
    assert before.encode(" cat").tokens != ["Ġcat"] == after.encode(" cat").tokens
    for text in ("the cattle? cat", " zz ants", "assistant\n", 'The "cat".'):
        assert after.decode(after.encode(text).ids) == text
    assert before.encode("the zz ants, cattle").tokens[:6] == after.encode("the zz ants, cattle").tokens[:6]
    everything, _ = words.add_words(cut, source, ["A cat, a cat and the ants."], 50)
    assert "Ġants" not in everything["model"]["vocab"]  # its steps are none of Whisper's tokens


def test_a_sentence_opens_without_a_space_behind_the_quote_only():
    names = ["Hello", "ĠHello", "Ġworld", "x"]
    assert assemble.openings(names) == [0]


def test_the_projector_is_the_identity_with_flags_for_audio_and_the_beginnings_of_clips():
    frames, first = torch.randn(9000, at.STATE), torch.randn(3500, at.STATE)
    frames[:, 7], first[:, 7] = 2 * torch.rand(9000), 4 + 2 * torch.rand(3500)
    tensors = assemble.projector(frames[:8000], first[:3000])
    part = {name.rpartition("projector.")[2]: tensor for name, tensor in tensors.items()}
    rows = torch.cat([frames, first])
    inner = F.gelu(rows @ part["linear_1.weight"].T + part["linear_1.bias"])
    out = inner @ part["linear_2.weight"].T + part["linear_2.bias"]
    fitted = torch.cat([torch.arange(8000), torch.arange(9000, 12000)])
    torch.testing.assert_close(out[fitted, : at.STATE], rows[fitted], atol=1e-3, rtol=0)
    assert (out[:, at.AUDIO] == at.AUDIO_FLAG).all()
    assert (out[:, at.CLIP] == -counting.CLIP_SIZE / 2).all()
    is_first = torch.arange(len(rows)) >= 9000
    is_right = (out[:, at.BEGIN] / counting.BEGIN_SIZE).round() == is_first
    assert is_right[8000:9000].float().mean() > 0.99  # rows that it was not fitted on
    assert is_right[12000:].float().mean() > 0.95


def test_whispers_states_follow_its_layers():
    layer = random_layer()
    whisper = object.__new__(Whisper)
    whisper.embeddings, whisper.positions = torch.randn(9, at.STATE), torch.randn(20, at.STATE)
    whisper.layers, whisper.encoder_norm = [layer], random_norm()
    states = whisper.states(torch.tensor([1, 2, 3]), torch.randn(10, at.STATE))
    assert len(states) == 4
    assert all(state.shape == (3, at.STATE) for state in states)
    assert max(float(state.mean(1).abs().max()) for state in states) < 1e-5


# made even for quantization


def test_factors_change_nothing_in_float_and_much_in_int8():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    x[:, 3] *= 0.02  # a small flag that decides by a large column
    reader = torch.nn.Linear(64, 32, bias=False)
    torch.nn.init.normal_(reader.weight, std=0.1, generator=generator)
    with torch.no_grad():
        reader.weight[:, 3] = 50.0
    gain = torch.ones(64)
    wanted = x @ reader.weight.detach().T
    before = equalize._error(x, [reader], torch.ones(64))
    channels = equalize.Channel("norm", [gain], [reader])
    factors = min(
        (equalize._factors(x, [reader], power) for power in equalize.POWERS),
        key=lambda tried: equalize._error(x * tried, [reader], tried),
    )
    channels.multiply(factors)
    torch.testing.assert_close((x * gain) @ reader.weight.detach().T, wanted)
    assert equalize._error(x * gain, [reader], torch.ones(64)) < before / 100


def test_the_flag_of_assistant_is_read_by_columns_no_larger_than_those_of_other_flags():
    readers = [torch.nn.Linear(at.WIDTH, 64, bias=False) for _ in range(3)]
    with torch.no_grad():
        for reader in readers:
            torch.nn.init.normal_(reader.weight, std=0.1)
        readers[1].weight[0, at.AUDIO], readers[1].weight[0, at.START] = 7.0, -1770.0
    assert equalize._start_factor(readers) == 256
    with torch.no_grad():
        readers[1].weight[0, at.START] = 0.0
    assert equalize._start_factor(readers) == 1


def test_neurons_are_made_no_larger_than_float16_bears():
    """An up of 11,066 whose gate is shut became 2.8 million: infinite in float16."""
    factors = equalize._bounded(torch.full((4,), 256.0), torch.tensor([0.0, 1.0, 100.0, 11066.0]))
    assert factors.tolist() == [256, 256, 64, 1]
    smaller = torch.tensor([0.25, 4.0])
    assert torch.equal(equalize._bounded(smaller, torch.tensor([2e4, 1.0])), smaller)
