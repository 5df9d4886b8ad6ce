"""Layer 0: the position of every token of a transcript, and which tokens are the transcript, out of rotary attention.

Whisper adds a learned vector for each position. Here six heads look at `assistant` (value 1) or at the sinks,
`<|im_start|>` (value 0), and write six codes:

| head | score of `assistant` over a sink | what its code tells |
|---|---|---|
| 0 to 4 | cosine or sine of the distance, in three rotary pairs | the distance to `assistant` |
| 5 | 6, and the nearer of the two wins | whether the token belongs to an answer |

The layer's MLP reads the codes and nothing else, takes them off again and writes Whisper's positions into the first
answer, from the opening quote on, and HEADER, OPEN and ANSWER into what is not the transcript. The codes of the
distances are corners of their convex hull, so one plane cuts each off from all others: neurons that are open on one
side of such planes are hats over single distances, and what they write follows by least squares. A transcript is known
by its distance to `assistant`: its framing ("The spoken content of the audio is") always has the same tokens. In later
answers of a conversation the codes mix two distances, mostly no hat is open, and they get marks and no positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import (
    ANSWER,
    AUDIO,
    AUDIO_NORMED,
    CODES,
    CONST,
    FLAG,
    HEAD,
    HEADER,
    HEADS,
    INNER,
    MARK,
    OPEN,
    SINK,
    SINK_NORMED,
    START,
    STATE,
    THETA,
    WIDTH,
    Layer,
    centred,
    rms_norm,
)
from .masks import CROSS_MARGIN, GATE_SHUT, kind_rows, unit

CODE_SIZE = 1.2
DISTANCE_CODES = ((0, "cos"), (0, "sin"), (1, "cos"), (1, "sin"), (2, "cos"))  # rotary pair and function
MODE_HEAD = 5
NEARNESS = ((1, 20.0), (2, 600.0), (3, 1600.0))  # pair, score: the nearer of `assistant` and sinks wins
MODE_BONUS = 6.0  # of `assistant` over the sink one token further
SINKS_OF_A_TURN = 3  # system, user, assistant
LAST = 200  # tokens of an answer that have positions
SEEN = 0.15  # HEADER of the newline behind `assistant`: a transcript sees it a little, it may carry the task
WIDTHS, SLOPE, MODE_SLOPE = (0.5, 1.0, 2.0, 4.0), 0.75, 20.0  # of the hats
NOISE, RIDGE, SAMPLES = 2e-3, 1e-5, 24000  # of the fit; noise: for lower precision
SHARES = {
    "answer": (0.7, 1.0),
    "before": (0.05, 0.3),
    "between": (0.1, 0.1),
    "later": (0.15, 0.02),
}  # and weights


@dataclass(frozen=True)
class Cases:
    """Tokens to fit on: codes (N, 6), what to write (N, WIDTH), and how much each counts (N,)."""

    codes: Tensor
    targets: Tensor
    weights: Tensor


def angle_of(pair: int, distance: Tensor) -> Tensor:
    """How far a rotary pair turns over a distance in tokens."""
    return distance.double() * THETA ** (-2 * pair / HEAD)


def attention_part(layer: Layer, start_normed: float) -> None:
    """The heads. `start_normed`: the flag START of `assistant` after RMSNorm."""
    u = unit(CROSS_MARGIN)
    for head in range(HEADS):
        (first, second), base = kind_rows(head), head * HEAD
        weight = MODE_BONUS if head == MODE_HEAD else math.log(SINKS_OF_A_TURN)
        layer.bq[first] = u
        layer.k[first, SINK] = u / SINK_NORMED
        layer.k[first, START] = (u + weight * math.sqrt(HEAD) / u) / start_normed
        layer.q[second, AUDIO], layer.q[second, SINK] = -u / AUDIO_NORMED, -u / SINK_NORMED
        layer.k[second, SINK] = -3 * u / SINK_NORMED
        if head == MODE_HEAD:
            for pair, score in NEARNESS:
                size = math.sqrt(score * math.sqrt(HEAD))
                layer.bq[base + pair] = size
                layer.k[base + pair, START], layer.k[base + pair, SINK] = (
                    size / start_normed,
                    size / SINK_NORMED,
                )
        else:
            pair, function = DISTANCE_CODES[head]
            layer.k[base + pair, START] = math.sqrt(HEAD) / start_normed
            layer.bq[base + pair + (0 if function == "cos" else HEAD // 2)] = 1 if function == "cos" else -1
        layer.v[base, START], layer.o[CODES[head], base] = 1 / start_normed, CODE_SIZE
    asking = layer.bq.nonzero()[:, 0]  # audio and sinks ask for sinks only
    for flag, value in ((AUDIO, AUDIO_NORMED), (SINK, SINK_NORMED)):
        layer.q[asking, flag] = -layer.bq[asking] / value


def distance_codes(distances: Tensor, num_sinks: int = SINKS_OF_A_TURN) -> Tensor:
    """The first five codes (N, 5) of tokens at `distances` (N, T) from T `assistant` tokens, among so many sinks."""
    scores = torch.stack([getattr(angle_of(p, distances), f)() for p, f in DISTANCE_CODES], -1)  # (N, T, 5)
    seen = SINKS_OF_A_TURN * scores.exp().sum(1)
    return (CODE_SIZE * seen / (seen + num_sinks)).float()


def mode_codes(distances: Tensor) -> Tensor:
    """The last code (N,) of tokens of an answer at `distances` (N,) from its `assistant`."""
    ahead = [
        score * (angle_of(pair, distances).cos() - angle_of(pair, distances + 1).cos())
        for pair, score in NEARNESS
    ]
    return (CODE_SIZE * torch.sigmoid(MODE_BONUS + sum(ahead))).float()


def answer_codes(last: int = LAST) -> Tensor:
    """Codes (last, 6) of a first answer's tokens, by distance to `assistant`."""
    distances = torch.arange(last)
    return torch.cat([distance_codes(distances[:, None]), mode_codes(distances)[:, None]], 1)


def answer_targets(positions: Tensor, quote: int, last: int = LAST) -> Tensor:
    """What layer 0 writes (last, WIDTH) into a first answer whose opening quote has the distance `quote`."""
    positions, targets = centred(positions), torch.zeros(last, WIDTH)
    targets[0, :STATE], targets[quote:, :STATE] = positions[0], positions[1 : last - quote + 1]
    targets[1:quote, [HEADER, OPEN, ANSWER]] = MARK
    targets[1, HEADER] = SEEN * MARK
    return targets


def draw_cases(positions: Tensor, quote: int, count: int = SAMPLES) -> Cases:
    """Tokens of first answers; of text before any answer; of text between answers; of later answers."""
    sizes = {name: int(share * count) for name, (share, _) in SHARES.items()}
    index = torch.randint(LAST, (sizes["answer"],))
    codes, targets = {"answer": answer_codes()[index]}, {"answer": answer_targets(positions, quote)[index]}
    marks = torch.zeros(WIDTH)
    marks[[HEADER, OPEN]] = MARK
    codes["before"] = torch.zeros(sizes["before"], len(CODES))
    distances = torch.randint(100, (sizes["between"], 1))
    leak = 0.06 * torch.rand(len(distances), 1)
    codes["between"] = torch.cat([distance_codes(distances, 4), CODE_SIZE * leak], 1)
    nearer = torch.randint(60, (sizes["later"],))
    distances = torch.stack([nearer, nearer + torch.randint(15, 120, nearer.shape)], 1)
    codes["later"] = torch.cat([distance_codes(distances, 5), mode_codes(nearer)[:, None]], 1)
    for name in ("before", "between", "later"):
        targets[name] = marks.expand(sizes[name], -1).clone()
    targets["later"][:, ANSWER] = MARK
    for name, target in targets.items():
        target[:, list(CODES)] = -codes[name]
    weights = [torch.full((len(codes[name]),), SHARES[name][1]) for name in codes]
    return Cases(torch.cat([*codes.values()]), torch.cat([*targets.values()]), torch.cat(weights))


def normed(codes: Tensor, energies: Tensor) -> Tensor:
    """The MLP's inputs (N, 7), codes and CONST behind RMSNorm, beside states of squared lengths `energies` (N,)."""
    x = torch.cat([codes, torch.full((len(codes), 1), FLAG)], 1)
    return x / torch.sqrt((x.pow(2).sum(1) + energies) / WIDTH)[:, None]


def hats() -> tuple[Tensor, Tensor]:
    """Gates and ups (INNER, 7): planes that cut single distances off, at several heights, then random ones."""
    codes = answer_codes()[:, :-1].double()
    mean = codes.mean(0)
    normals = (codes - mean) @ torch.linalg.inv((codes - mean).T @ (codes - mean) / len(codes))
    heights = (normals * codes).sum(1)
    gates = []
    for width in WIDTHS:
        gate = torch.zeros(LAST, 7, dtype=torch.float64)
        gate[:, :5], gate[:, 5] = normals, MODE_SLOPE / CODE_SIZE
        gate[:, 6] = (width - heights - MODE_SLOPE) / FLAG
        gates.append(gate * SLOPE / width)
    fixed = torch.cat(gates).float()
    rest = INNER - len(fixed)
    ups = torch.zeros(len(fixed), 7)
    ups[:, 6] = 1
    return torch.cat([fixed, torch.randn(rest, 7)]), torch.cat([ups, 0.5 * torch.randn(rest, 7)])


def fit_mlp(layer: Layer, cases: Cases, energies: Tensor) -> None:
    """Sets the MLP.

    Args:
        layer: changed in place.
        cases: what to learn.
        energies: squared lengths of the embeddings' states, (V,): they enter RMSNorm.
    """
    gate, up = hats()
    x = normed(cases.codes, energies[torch.randint(len(energies), (len(cases.codes),))])
    x = x * (1 + NOISE * torch.randn_like(x))
    inner = (F.silu(x @ gate.T) * (x @ up.T)).double()  # (N, INNER)
    size = inner.pow(2).mean(0).sqrt() + 1e-9
    inner = inner / size
    weighted = inner * cases.weights[:, None]
    matrix = weighted.T @ inner / len(inner) + RIDGE * torch.eye(INNER)
    down = torch.linalg.solve(matrix, weighted.T @ cases.targets.double() / len(inner)) / size[:, None]
    columns = [*CODES, CONST]
    layer.gate[:, columns], layer.up[:, columns] = gate, up
    layer.down = down.T.float().contiguous()


def position_layer(embeddings: Tensor, positions: Tensor, start: int, quote: int) -> Layer:
    """Layer 0.

    Args:
        embeddings: (V, WIDTH), as they enter the layer.
        positions: Whisper's, (448, STATE).
        start: token of `assistant`.
        quote: its distance to the opening quote, in tokens.
    """
    layer = Layer()
    attention_part(layer, float(rms_norm(embeddings)[start, START]))
    text = embeddings[embeddings[:, CONST] != 0]
    fit_mlp(layer, draw_cases(positions, quote), text[:, :STATE].pow(2).sum(1))
    layer.gate[:, AUDIO], layer.gate[:, SINK] = GATE_SHUT / AUDIO_NORMED, GATE_SHUT / SINK_NORMED
    return layer
