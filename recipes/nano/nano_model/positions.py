"""Layer 0: the position of every token of a transcript, and which tokens are the transcript, out of rotary attention.

Whisper adds a learned vector for each position. Here six heads look at `assistant` (value 1) or at the sinks,
`<|im_start|>` (value 0), and write six codes:

| head | score of `assistant` over a sink | what its code tells |
|---|---|---|
| 0 to 4 | cosine or sine of the distance, in three rotary pairs | the distance to `assistant` |
| 5 | 1; the nearest of sinks, `assistant` (value 1/2) and opening quotes (1) wins | text, answer or transcript |

The layer's MLP reads the codes and nothing else, takes them off again and writes Whisper's positions into the first
answer's transcript, and HEADER, OPEN and ANSWER into what is not a transcript. The codes of the
distances are corners of their convex hull, so one plane cuts each off from all others: neurons that are open on one
side of such planes are hats over single distances, and what they write follows by least squares. Positions are counted
from `assistant`, because the framing of a transcript ("The spoken content of the audio is") always has the same
tokens: the quote has position 1 and its first word 2, as behind Whisper's own two opening tokens. In later answers of a
conversation the codes mix two distances, mostly no hat is open, and they get marks and no positions.
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
    QUOTE,
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
from .masks import GATE_SHUT, kind_rows

CODE_SIZE = 1.2
DISTANCE_CODES = ((0, "cos"), (0, "sin"), (1, "cos"), (1, "sin"), (2, "cos"))  # rotary pair and function
MODE_HEAD = 5
# Of sinks, `assistant` and quotes the nearest wins: rotary pair, score and angle at no distance. A token of distance
# takes 0.8 off the score. Keys of these sizes come out the same in bfloat16, behind whichever of the three flags (as
# long as Whisper's two opening tokens give them), where rounding would else be worth 3.
NEARNESS = ((2, 44.59, math.pi / 2), (3, 713.44, math.pi / 3))
MODE_BONUS = 1.0  # of `assistant` and quotes over the sink one token before `assistant`
LOOK = 13.972  # size of q and k in the masks: so all scores of this layer are the same in bfloat16, to 0.02
SINKS_OF_A_TURN = 3  # system, user, assistant
LAST = 200  # tokens of an answer that have positions
WIDTHS, SLOPE, MODE_SLOPE = (0.5, 1.0, 2.0, 4.0), 0.75, 24.0  # of the hats
MODE_STEPS = (0.15, 0.25, 0.35, 0.65, 0.75, 0.85)  # where the mode changes from text to answer to transcript
NOISE, RIDGE, SAMPLES = 1.5e-3, 2e-6, 48000  # of the fit; noise: for lower precision
EARLY_WEIGHT, EARLY = 4.0, 40
MODE_NOISE = {"assistant": 0.06, "answer": 0.06, "transcript": 0.005}  # of the last code, in lower precision
SHARES = {  # of the samples, and weights
    # Every token of a transcript looks at `assistant`: a tenth of a mark left on it takes 2 off all its scores.
    "assistant": (0.1, 5.0),
    "transcript": (0.5, 1.0),
    "answer": (0.15, 1.5),
    "before": (0.05, 0.3),
    "between": (0.1, 0.3),
    "later": (0.15, 0.02),
}


@dataclass(frozen=True)
class Cases:
    """Tokens to fit on: codes (N, 6), what to write (N, WIDTH), how much each counts, which are `assistant` (N,)."""

    codes: Tensor
    targets: Tensor
    weights: Tensor
    is_start: Tensor


def angle_of(pair: int, distance: Tensor) -> Tensor:
    """How far a rotary pair turns over a distance in tokens."""
    return distance.double() * THETA ** (-2 * pair / HEAD)


def attention_part(layer: Layer, start_normed: float, quote_normed: float) -> None:
    """The heads. `start_normed`, `quote_normed`: flags of `assistant` and of the opening quote after RMSNorm."""
    u = LOOK
    for head in range(HEADS):
        (first, second), base = kind_rows(head), head * HEAD
        weight = MODE_BONUS if head == MODE_HEAD else math.log(SINKS_OF_A_TURN)
        layer.bq[first] = u
        layer.k[first, SINK] = u / SINK_NORMED
        layer.k[first, START] = (u + weight * math.sqrt(HEAD) / u) / start_normed
        layer.q[second, AUDIO], layer.q[second, SINK] = -u / AUDIO_NORMED, -u / SINK_NORMED
        layer.k[second, SINK] = -3 * u / SINK_NORMED
        if head == MODE_HEAD:
            for pair, score, angle in NEARNESS:
                size = math.sqrt(score * math.sqrt(HEAD))
                layer.bq[base + pair] = size * math.cos(angle)
                layer.bq[base + HEAD // 2 + pair] = size * math.sin(angle)
                for flag, value in ((START, start_normed), (QUOTE, quote_normed), (SINK, SINK_NORMED)):
                    layer.k[base + pair, flag] = size / value
            layer.k[first, QUOTE] = (u + weight * math.sqrt(HEAD) / u) / quote_normed
            layer.v[base, QUOTE] = 1 / quote_normed
        else:
            pair, function = DISTANCE_CODES[head]
            layer.k[base + pair, START] = math.sqrt(HEAD) / start_normed
            layer.bq[base + pair + (0 if function == "cos" else HEAD // 2)] = 1 if function == "cos" else -1
        layer.v[base, START] = (0.5 if head == MODE_HEAD else 1) / start_normed
        layer.o[CODES[head], base] = CODE_SIZE
    asking = layer.bq.nonzero()[:, 0]  # audio and sinks ask for sinks only
    for flag, value in ((AUDIO, AUDIO_NORMED), (SINK, SINK_NORMED)):
        layer.q[asking, flag] = -layer.bq[asking] / value


def distance_codes(distances: Tensor, num_sinks: int = SINKS_OF_A_TURN) -> Tensor:
    """The first five codes (N, 5) of tokens at `distances` (N, T) from T `assistant` tokens, among so many sinks."""
    scores = torch.stack([getattr(angle_of(p, distances), f)() for p, f in DISTANCE_CODES], -1)  # (N, T, 5)
    seen = SINKS_OF_A_TURN * scores.exp().sum(1)
    return (CODE_SIZE * seen / (seen + num_sinks)).float()


def mode_codes(distances: Tensor, quote: int | None) -> Tensor:
    """The last code (N,) of tokens of an answer at `distances` (N,) from its `assistant`.

    Args:
        distances: in tokens.
        quote: distance between `assistant` and the opening quote, None where there is no quote.
    """

    def nearness(distance: Tensor) -> Tensor:
        scores = [score * (angle_of(pair, distance) + angle).cos() for pair, score, angle in NEARNESS]
        return torch.stack(scores).sum(0)

    scores = [nearness(distances) + MODE_BONUS, nearness(distances + 1)]
    if quote is not None:
        behind = nearness(distances - quote) + MODE_BONUS
        scores.append(behind.masked_fill(distances < quote, -1e4))
    shares = torch.stack(scores).softmax(0)
    return (CODE_SIZE * (0.5 * shares[0] + (shares[2] if quote is not None else 0))).float()


def answer_codes(quote: int | None, last: int = LAST) -> Tensor:
    """Codes (last, 6) of a first answer's tokens, by distance to `assistant`, with or without a quote."""
    distances = torch.arange(last)
    return torch.cat([distance_codes(distances[:, None]), mode_codes(distances, quote)[:, None]], 1)


def answer_targets(positions: Tensor, quote: int, last: int = LAST) -> Tensor:
    """What layer 0 writes (last, WIDTH) into a first answer whose opening quote has the distance `quote`."""
    positions, targets = centred(positions), torch.zeros(last, WIDTH)
    targets[0, :STATE], targets[quote:, :STATE] = positions[0], positions[1 : last - quote + 1]
    targets[1:quote, [HEADER, OPEN, ANSWER]] = MARK
    return targets


def draw_cases(positions: Tensor, quote: int, count: int = SAMPLES) -> Cases:
    """Tokens of transcripts; of other first answers; of text before any answer, between answers; of later answers."""
    sizes = {name: int(share * count) for name, (share, _) in SHARES.items()}
    codes, targets, importance, starts = {}, {}, {}, {}
    for name, where in (("transcript", quote), ("answer", None)):
        index = torch.randint(LAST, (sizes[name],))
        codes[name] = answer_codes(where)[index]
        targets[name] = answer_targets(positions, quote if where is not None else LAST)[index]
        starts[name] = index == 0
        importance[name] = torch.where(index <= EARLY, EARLY_WEIGHT, 1.0)
    codes["assistant"] = answer_codes(None)[:1].repeat(sizes["assistant"], 1)
    targets["assistant"] = answer_targets(positions, LAST)[:1].repeat(sizes["assistant"], 1)
    starts["assistant"] = torch.ones(sizes["assistant"], dtype=torch.bool)
    marks = torch.zeros(WIDTH)
    marks[[HEADER, OPEN]] = MARK
    codes["before"] = torch.zeros(sizes["before"], len(CODES))
    distances = torch.randint(100, (sizes["between"], 1))
    leak = 0.06 * torch.rand(len(distances), 1)
    codes["between"] = torch.cat([distance_codes(distances, 4), CODE_SIZE * leak], 1)
    nearer = torch.randint(60, (sizes["later"],))
    distances = torch.stack([nearer, nearer + torch.randint(15, 120, nearer.shape)], 1)
    codes["later"] = torch.cat([distance_codes(distances, 5), mode_codes(nearer, None)[:, None]], 1)
    for name in ("before", "between", "later"):
        targets[name] = marks.expand(sizes[name], -1).clone()
    targets["later"][:, ANSWER] = MARK
    for name, target in targets.items():
        codes[name][:, -1] *= 1 - MODE_NOISE.get(name, 0.0) * torch.randn(len(target)).abs()
        target[:, list(CODES)] = -codes[name]
    weights = [SHARES[name][1] * importance.get(name, torch.ones(sizes[name])) for name in SHARES]
    is_start = [starts.get(name, torch.zeros(sizes[name], dtype=torch.bool)) for name in SHARES]
    lists = ([codes[name] for name in SHARES], [targets[name] for name in SHARES], weights, is_start)
    return Cases(*map(torch.cat, lists))


def normed(codes: Tensor, energies: Tensor) -> Tensor:
    """The MLP's inputs (N, 7), codes and CONST behind RMSNorm, beside states of squared lengths `energies` (N,)."""
    x = torch.cat([codes, torch.full((len(codes), 1), FLAG)], 1)
    return x / torch.sqrt((x.pow(2).sum(1) + energies) / WIDTH)[:, None]


def hats() -> tuple[Tensor, Tensor]:
    """Gates and ups (INNER, 7): planes that cut single distances off, at several heights, then random ones."""
    codes = answer_codes(None)[:, :-1].double()
    mean = codes.mean(0)
    normals = (codes - mean) @ torch.linalg.inv((codes - mean).T @ (codes - mean) / len(codes))
    heights = (normals * codes).sum(1)
    gates = []
    for width in WIDTHS:
        gate = torch.zeros(LAST, 7, dtype=torch.float64)
        gate[:, :5], gate[1:, 5] = normals, MODE_SLOPE / CODE_SIZE
        gate[:, 6] = width - heights
        gate[1:, 6] -= MODE_SLOPE  # shut outside of transcripts, but for `assistant` itself
        gates.append(gate * SLOPE / width)
    steps = torch.zeros(2 * len(MODE_STEPS), 7, dtype=torch.float64)
    for number, step in enumerate(MODE_STEPS):
        for sign, row in ((1, 2 * number), (-1, 2 * number + 1)):
            steps[row, 5], steps[row, 6] = sign * MODE_SLOPE / CODE_SIZE, -sign * MODE_SLOPE * step
    fixed = torch.cat([*gates, steps])
    fixed[:, 6] /= FLAG
    fixed, rest = fixed.float(), INNER - len(fixed)
    ups = torch.zeros(len(fixed), 7)
    ups[:, 6] = 1
    gate, up = torch.cat([fixed, torch.randn(rest, 7)]), torch.cat([ups, 0.5 * torch.randn(rest, 7)])
    return gate.bfloat16().float(), up.bfloat16().float()  # what they cut off stays so in lower precision


def fit_mlp(layer: Layer, cases: Cases, energies: Tensor, start: int) -> None:
    """Sets the MLP.

    Args:
        layer: changed in place.
        cases: what to learn.
        energies: squared lengths of the embeddings' states, (V,): they enter RMSNorm.
        start: number of `assistant` among them.
    """
    gate, up = hats()
    tokens = torch.randint(len(energies), (len(cases.codes),)).masked_fill(cases.is_start, start)
    x = normed(cases.codes, energies[tokens])
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
    quotes = rms_norm(embeddings)[:, QUOTE]
    attention_part(layer, float(rms_norm(embeddings)[start, START]), float(quotes.max()))
    is_text = embeddings[:, CONST] != 0
    energies = embeddings[is_text, :STATE].pow(2).sum(1)
    fit_mlp(layer, draw_cases(positions, quote), energies, int(is_text[:start].sum()))
    layer.gate[:, AUDIO], layer.gate[:, SINK] = GATE_SHUT / AUDIO_NORMED, GATE_SHUT / SINK_NORMED
    return layer
