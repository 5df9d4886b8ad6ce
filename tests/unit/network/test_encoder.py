"""The encoder: packing is exact, padding has no influence, shapes are what the docstrings say."""

from __future__ import annotations

from collections.abc import Generator

import torch

from audioflamingo.network.encoder import AudioFlamingo3Encoder
from tests.support.tiny_model import tiny_model, tokens_of

FRAMES = [3000, 1, 700, 2, 3000, 3, 2999, 4, 5, 2997]


def features_and_mask(frames: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(frames), 128, 3000, generator=generator)
    return features, (torch.arange(3000) < torch.tensor(frames)[:, None]).int()


def encoder() -> AudioFlamingo3Encoder:
    return tiny_model().model.audio_tower


def plain(encoder: AudioFlamingo3Encoder, features: torch.Tensor, num_valid: int) -> torch.Tensor:
    """Whisper's encoder written out for one window over all 1500 positions, with masked keys; `(A, D)`."""
    f = torch.nn.functional
    conv = (num_valid - 1) // 2 + 1
    x = f.gelu(encoder.conv2(f.gelu(encoder.conv1(features[None]))))[0].T + encoder.embed_positions.weight
    for layer in encoder.layers:
        attention, h = layer.self_attn, layer.self_attn_layer_norm(x)
        heads = [
            p(h).unflatten(-1, (4, 8)).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        scores = heads[0] @ heads[1].transpose(1, 2) / 8**0.5
        scores[:, :, conv:] = -torch.inf
        x = x + attention.out_proj((scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1))
        x = x + layer.fc2(f.gelu(layer.fc1(layer.final_layer_norm(x))))
    pooled = f.avg_pool1d(x.T[None], 2, 2)[0].T
    return encoder.layer_norm(pooled)[: tokens_of(num_valid)]


@torch.no_grad()
def test_packed_windows_equal_the_plain_formula() -> None:
    tower = encoder()
    features, mask = features_and_mask(FRAMES)
    out = tower(features, mask)
    expected = [plain(tower, window, frames) for window, frames in zip(features, FRAMES, strict=True)]
    torch.testing.assert_close(out.audio_tokens, torch.cat(expected), atol=1e-5, rtol=0)
    assert out.last_hidden_state.shape == (len(FRAMES), 750, 32)
    for window, rows in zip(out.last_hidden_state, expected, strict=True):
        torch.testing.assert_close(window[: len(rows)], rows, atol=1e-5, rtol=0)
        assert not window[len(rows) :].any()


@torch.no_grad()
def test_garbage_in_padded_frames_changes_nothing() -> None:
    """P5: only the one or two frames that the kernels reach past the last valid position have influence."""
    tower = encoder()
    features, mask = features_and_mask([700, 33, 3000])
    clean = tower(features, mask).audio_tokens
    for window, frames in enumerate([700, 33, 3000]):
        reach = 2 * ((frames - 1) // 2 + 1) + 1
        features[window, :, reach:] = float("nan")
    assert torch.equal(tower(features, mask).audio_tokens, clean)
    features[1, :, 2 * 17] += 1.0
    assert not torch.equal(tower(features, mask).audio_tokens, clean)


@torch.no_grad()
def test_windows_do_not_see_each_other() -> None:
    tower = encoder()
    features, mask = features_and_mask([900, 40, 900])
    together = tower(features, mask).audio_tokens.split([tokens_of(n) for n in (900, 40, 900)])
    for window, part in enumerate(together):
        alone = tower(features[window : window + 1], mask[window : window + 1]).audio_tokens
        torch.testing.assert_close(part, alone, atol=1e-6, rtol=0)


@torch.no_grad()
def test_windows_without_audio_tokens_and_no_windows_at_all() -> None:
    tower = encoder()
    features, mask = features_and_mask([1, 2, 0])
    out = tower(features, mask)
    assert out.audio_tokens.shape == (0, 32)
    assert out.last_hidden_state.shape == (3, 750, 32)
    assert tower(features[:0], mask[:0]).last_hidden_state.shape == (0, 750, 32)


@torch.no_grad()
def test_no_mask_means_all_frames_and_shorter_windows_are_fine() -> None:
    tower = encoder()
    features, _ = features_and_mask([3000])
    assert tower(features).audio_tokens.shape == (750, 32)
    for frames in (200, 201, 203):
        short = tower(features[:, :, :frames])
        assert short.last_hidden_state.shape == (1, tokens_of(frames), 32)


@torch.no_grad()
def test_work_follows_the_audio_not_the_window() -> None:
    """A 3 s clip costs a tenth of a 30 s one: counted in rows that the first layer sees."""
    tower = encoder()
    rows = []
    tower.layers[0].fc1.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[0]))
    tower(*features_and_mask([300]))
    tower(*features_and_mask([3000, 3000, 20]))
    assert rows == [150, 3010]


def test_dropout_and_layerdrop_act_in_training_only() -> None:
    tower = encoder()
    features, mask = features_and_mask([300])
    tower.config.dropout = 0.5
    for layer in tower.layers:
        layer.dropout = layer.activation_dropout = layer.self_attn.dropout = 0.5
    with torch.no_grad():
        assert torch.equal(tower(features, mask).audio_tokens, tower(features, mask).audio_tokens)
        tower.train()
        assert not torch.equal(tower(features, mask).audio_tokens, tower(features, mask).audio_tokens)


def collect(
    pieces: Generator[None, None, torch.Tensor], results: list[torch.Tensor]
) -> Generator[None, None, None]:
    results.append((yield from pieces))


@torch.no_grad()
def test_a_window_in_pieces_equals_the_window_at_once() -> None:
    tower = encoder()
    frames = [3000, 1025, 9]
    features, mask = features_and_mask(frames)
    expected = tower(features, mask).audio_tokens.split([tokens_of(n) for n in frames])
    for window, num_frames, rows in zip(features, frames, expected, strict=True):
        pieces = tower.in_pieces(window, num_frames, num_positions=200)
        results: list[torch.Tensor] = []
        num_pieces = sum(1 for _ in collect(pieces, results))
        torch.testing.assert_close(results[0], rows, atol=1e-5, rtol=0)
        positions = (num_frames - 1) // 2 + 1
        assert num_pieces == 2 * -(-positions // 200)
