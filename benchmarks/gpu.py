"""Speed on a GPU: this package beside transformers, with random weights of the published geometry, made on the card.

    python benchmarks/gpu.py [--output results.json] [--seconds 460] [--only NAME ...] [--tiny]

Needs the source tree, torch, numpy, tokenizers, safetensors (triton for what is quantized; transformers for its own
rows); no network, no checkpoint, no audio. Each row is printed, and written to the output, as soon as it is there. A
part for which there may be no time left is left out and said to be, and after `--seconds` whatever runs is cut off. The
last line is everything as JSON, also then.

Answers are checked before they are timed: captured steps must give the ids of eager ones, packed weights the product of
the weights that they stand for, a row in a batch what it gives alone. A check that fails is a row of its own, and the
exit status is 1.

Times are medians after a warm-up. The card's own speed is measured first (a large copy, a large product), and what a
decode step reaches of it is `share`: the bytes of the weights that it must read, a second, over those of the copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SOUND, END, PAD = 151669, 151645, 151671
BEGINNING = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
QUESTION = [3838, 374, 419, 30, 151645, 198, 151644, 77091, 198]
NEXT_QUESTION = [151645, 198, 151644, 872, 198, 10234, 30, 151645, 198, 151644, 77091, 198]
CLIPS_S = (5, 30, 600)
ROWS = (1, 8, 64)
NUM_TOKENS = 64  # of an answer, whose first comes from the prompt
GOALS = {  # on an H100: what a row should reach, at least or at most
    "decode bf16 1": ("tokens_per_s", 160, "least"),
    "decode int8 1": ("tokens_per_s", 280, "least"),
    "decode int4 1": ("tokens_per_s", 400, "least"),
    "decode bf16 64": ("tokens_per_s", 5000, "least"),
    "first token 5": ("ms", 20, "most"),
    "first token 30": ("ms", 50, "most"),
    "first token 600": ("ms", 900, "most"),
    "second question": ("ms", 15, "most"),
    "peak memory bf16": ("gb", 18, "most"),
    "peak memory int4": ("gb", 7.5, "most"),
}


def configuration(is_tiny: bool) -> dict[str, Any]:
    """The published geometry, or a small one of the same kind."""
    audio: dict[str, Any] = {"num_mel_bins": 128, "hidden_size": 1280, "intermediate_size": 5120}
    audio |= {"num_hidden_layers": 32, "num_attention_heads": 20}
    text: dict[str, Any] = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
    }
    text |= {"num_key_value_heads": 4, "vocab_size": 151672, "max_position_embeddings": 32768}
    if is_tiny:
        audio |= {
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        text |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2}
    text |= {"model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return {"audio_config": audio, "text_config": text, "audio_token_id": SOUND}


class Report:
    """Rows, printed and written as they come.

    Args:
        path: where to; None for nowhere.
        seconds: time for all of it.
        has_goals: whether rows say what they should reach.
    """

    def __init__(self, path: Path | None, seconds: float, has_goals: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.has_failed = False
        self._path = path
        self._start = time.perf_counter()
        self._seconds = seconds
        self._has_goals = has_goals

    def add(self, name: str, **values: Any) -> None:
        """Takes a row."""
        rounded = {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}
        if self._has_goals and name in GOALS and GOALS[name][0] in values:
            key, goal, kind = GOALS[name]
            rounded |= {"goal": goal, "met": values[key] >= goal if kind == "least" else values[key] <= goal}
        row = {"name": name, "at_s": round(time.perf_counter() - self._start, 1), **rounded}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self._path is not None:
            self._path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def check(self, name: str, is_right: bool, **values: Any) -> bool:
        """Takes a check."""
        self.has_failed |= not is_right
        self.add(f"check {name}", right=is_right, **values)
        return is_right

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Whatever goes wrong in a part is a row, and the others go on."""
        try:
            yield
        except Exception as error:
            self.has_failed = True
            self.add(f"failed {name}", error=f"{type(error).__name__}: {str(error)[:600]}")

    def has_time(self, name: str, needed_s: float = 30) -> bool:
        """Whether a part may still begin that takes about so long."""
        if time.perf_counter() - self._start + needed_s < self._seconds:
            return True
        self.add(f"left out {name}", reason="no time")
        return False

    def finish(self) -> None:
        """Ratios, what failed, and everything as one line."""
        compare(self)
        if self.has_failed:
            bad = [r["name"] for r in self.rows if r["name"].startswith("failed") or r.get("right") is False]
            self.add("something failed", names=bad)
        print(json.dumps(self.rows), flush=True)

    def watch(self) -> threading.Timer:
        """Ends the program when the time is over, wherever it is; to be cancelled by who ends before."""

        def cut_off() -> None:
            self.has_failed = True
            self.add("failed in time", error="cut off while a part ran")
            self.finish()
            os._exit(1)

        timer = threading.Timer(max(0.0, self._seconds - (time.perf_counter() - self._start)), cut_off)
        timer.daemon = True
        timer.start()
        return timer


class Bench:
    """What all parts share.

    Args:
        report: takes the rows.
        is_tiny: a model and clips for a test on a CPU.
    """

    def __init__(self, report: Report, is_tiny: bool) -> None:
        self.report = report
        self.is_tiny = is_tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clips_s = (5, 31) if is_tiny else CLIPS_S
        self.rows = (1, 2) if is_tiny else ROWS
        self.num_tokens = 4 if is_tiny else NUM_TOKENS
        self.copy_bytes_s = 0.0

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 5, warm_ups: int = 1) -> float:
        """The median of some runs, each to its end."""
        found = []
        for turn in range(warm_ups + repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            if turn >= warm_ups:
                found.append(time.perf_counter() - start)
        return statistics.median(found)

    def free(self) -> None:
        """Gives memory back and forgets its peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """The most memory since `free`."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    def inputs(self, clip_s: int, num_rows: int = 1, on_host: bool = False) -> dict[str, Tensor]:
        """Prompts about one clip of noise each."""
        frames = [min(3000, 100 * (clip_s - start)) for start in range(0, clip_s, 30)]
        num_audio = sum((((n - 1) // 2 + 1) - 2) // 2 + 1 for n in frames)
        ids = torch.tensor([BEGINNING + [SOUND] * num_audio + QUESTION] * num_rows)
        generator = torch.Generator().manual_seed(1)
        features = (torch.randn(len(frames), 128, 3000, generator=generator) * 0.5).bfloat16()
        mask = (torch.arange(3000) < torch.tensor(frames)[:, None]).long()
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": features.repeat(num_rows, 1, 1),
            "input_features_mask": mask.repeat(num_rows, 1),
        }
        return given if on_host else {name: value.to(self.device) for name, value in given.items()}


def measure_card(bench: Bench) -> None:
    """What the device can do at best: bytes of a copy a second, and operations of a large product."""
    size = 2**22 if bench.is_tiny else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    bench.copy_bytes_s = 2 * size / bench.seconds(lambda: target.copy_(source), 9, 3)
    width = 128 if bench.is_tiny else 8192
    matrix = torch.randn(width, width, device=bench.device).bfloat16()
    product_s = bench.seconds(lambda: matrix @ matrix, 9, 3)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    rate = 2 * width**3 / product_s / 1e12
    bench.report.add("card", device=name, copy_tb_s=bench.copy_bytes_s / 1e12, bf16_tflop_s=rate, **versions)


def build(bench: Bench, compile_steps: bool = True) -> Any:
    """Our model, its weights random on the device."""
    import audioflamingo as af

    start = time.perf_counter()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(bench.device):
            model = af.AudioFlamingo3ForConditionalGeneration(
                af.AudioFlamingo3Config.from_dict(configuration(bench.is_tiny))
            ).eval()
    finally:
        torch.set_default_dtype(default)
    model.generation_config.pad_token_id = PAD
    bench.synchronize()
    num_parameters = sum(p.numel() for p in model.parameters())
    bench.report.add("weights made", s=time.perf_counter() - start, parameters_m=num_parameters / 1e6)
    set_capturing(model, compile_steps)
    return model


def set_capturing(model: Any, is_on: bool) -> None:
    """Steps captured from now on, or eager; on a CPU the same steps without being recorded."""
    from audioflamingo.engine.captured_steps import CapturedSteps

    model.compiles_steps = is_on
    model.kept_steps = CapturedSteps(is_recorded=model.device.type == "cuda") if is_on else None


def answer(model: Any, given: dict[str, Tensor], num_tokens: int, **options: Any) -> Tensor:
    """Exactly so many tokens for each prompt."""
    wanted = {"max_new_tokens": num_tokens, "do_sample": False, **options}
    with torch.no_grad():
        return model.generate(**given, **wanted)[:, given["input_ids"].shape[1] :]


def measure_encoder(bench: Bench, model: Any, who: str) -> None:
    """The encoder and the projector."""
    for clip_s in bench.clips_s:
        given = bench.inputs(clip_s)
        features, mask = given["input_features"], given["input_features_mask"]

        def encode(features: Tensor = features, mask: Tensor = mask) -> None:
            with torch.no_grad():
                model.get_audio_features(features, mask)

        bench.report.add(f"encoder {clip_s}{who}", ms=1e3 * bench.seconds(encode))


def measure_first_token(bench: Bench, model: Any, who: str, **options: Any) -> None:
    """From features on the device to the first token on the host."""
    for clip_s in bench.clips_s:
        given = bench.inputs(clip_s)
        run = lambda given=given: answer(model, given, 1, **options)  # noqa: E731
        bench.report.add(f"first token {clip_s}{who}", ms=1e3 * bench.seconds(run))


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decode step must read: the language model's layers and the output layer."""
    parts = [model.model.language_model.layers, model.lm_head]
    return sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))


def measure_decode(bench: Bench, model: Any, name: str, rows: tuple[int, ...], **options: Any) -> None:
    """Steps behind the prompt of a 30 s clip: the time of many tokens less that of one."""
    for num_rows in rows:
        given = bench.inputs(30, num_rows)
        num = bench.num_tokens
        answer(model, given, num, **options)  # records what it needs
        one, many = (
            bench.seconds(lambda num=count: answer(model, given, num, **options), 3, 0)  # noqa: B023
            for count in (1, num)
        )
        step_s = max(1e-9, (many - one) / (num - 1))
        bench.report.add(
            f"decode {name} {num_rows}",
            tokens_per_s=num_rows / step_s,
            step_ms=1e3 * step_s,
            share=weight_bytes(model) / step_s / bench.copy_bytes_s
            if hasattr(model, "compiles_steps")
            else None,
        )


def check_captured(bench: Bench, model: Any, name: str) -> None:
    """Captured steps give the ids of eager ones, and rows of a batch those that they give alone.

    In bfloat16 other kernels may round otherwise and a near tie may then fall otherwise; random weights have many. So
    what is compared is how far the ids agree, and the first place where they do not must be a near tie.
    """
    given = bench.inputs(30, 2)
    set_capturing(model, False)
    eager = answer(model, given, bench.num_tokens, eos_token_id=[])
    set_capturing(model, True)
    captured = answer(model, given, bench.num_tokens, eos_token_id=[])
    steps = model.kept_steps
    agreement = (eager == captured).long().cumprod(1).sum(1)
    agreed = int(agreement.min())
    parted = (agreement == agreed).nonzero()[:, 0]
    gap = gap_at(model, given, eager, agreed, parted) if agreed < bench.num_tokens else 0.0
    bench.report.check(
        f"captured = eager {name}",
        not steps.has_failed and gap < 0.05,
        tokens_agreed=agreed,
        of=bench.num_tokens,
        relative_gap=gap,
        recorded=steps.num_recorded,
        recording_s=steps.recording_s,
    )


def gap_at(model: Any, given: dict[str, Tensor], ids: Tensor, place: int, rows: Tensor) -> float:
    """How far the best two logits of some rows are apart where two answers part, as a share of the logits' spread."""
    whole = torch.cat([given["input_ids"], ids[:, :place]], dim=1)
    with torch.no_grad():
        audio = {name: value for name, value in given.items() if name.startswith("input_features")}
        logits = model(input_ids=whole, **audio, logits_to_keep=1).logits[:, -1].float()
    best = logits.topk(2).values
    return float(((best[:, 0] - best[:, 1]) / logits.std(1))[rows].max())


def check_rows_alone(bench: Bench, model: Any) -> None:
    """Rows of unequal length in one call give the logits that each gives alone."""
    short, long = bench.inputs(5), bench.inputs(30)
    with torch.no_grad():
        alone = [model(**given, logits_to_keep=1).logits[:, -1].float() for given in (short, long)]
        width = long["input_ids"].shape[1]
        pad = width - short["input_ids"].shape[1]
        fills = {"input_ids": PAD, "attention_mask": 0}
        padded = {name: nn.functional.pad(short[name], (pad, 0), value=fill) for name, fill in fills.items()}
        both = {name: torch.cat([padded.get(name, short[name]), long[name]]) for name in long}
        together = model(**both, logits_to_keep=1).logits[:, -1].float()
    error = max(float((together[i] - alone[i][0]).norm() / alone[i].norm()) for i in range(2))
    bench.report.check("rows = alone", error < 0.02, relative_error=error)


def measure_second_question(bench: Bench, model: Any) -> None:
    """The first token of a question behind an answer that is in the cache."""
    given = bench.inputs(30)
    cache = model.new_cache(1, 4096)
    with torch.no_grad():
        model.generate(**given, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=[])
        length = cache.lengths[0]
        ids = torch.tensor([NEXT_QUESTION], device=bench.device)

        def ask() -> None:
            cache.crop([length])
            model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)

        bench.report.add("second question", ms=1e3 * bench.seconds(ask))


def measure_server(bench: Bench, model: Any) -> None:
    """The server's engine with many clients who ask about clips of their own, each answer as long as the others."""
    from audioflamingo.engine.engine import Engine
    from audioflamingo.engine.limits import EngineOptions
    from audioflamingo.engine.request import Request, SamplingParams
    from audioflamingo.engine.worker import EngineWorker
    from audioflamingo.processor.collate import unbatch

    num_clients = 3 if bench.is_tiny else 64
    num_tokens = bench.num_tokens * (1 if bench.is_tiny else 2)
    given = bench.inputs(5, num_clients, on_host=True)
    given["input_features"] = given["input_features"] + 0.01 * torch.arange(num_clients)[:, None, None]
    features, mask = given["input_features"].float(), given["input_features_mask"]
    prompts = unbatch(given["input_ids"], SOUND, given["attention_mask"], features, mask)
    options = EngineOptions(max_rows=num_clients, max_requests=num_clients, cache_tokens=num_clients * 512)
    worker = EngineWorker(Engine(model, None, options))
    start = time.perf_counter()
    worker.start()
    warm_up_s = time.perf_counter() - start
    first: list[float] = []
    left, done, lock = [num_clients], threading.Event(), threading.Lock()

    def take(output: Any) -> None:
        with lock:
            if output.first_token_at is not None and output.is_last:
                first.append(output.first_token_at)
            if output.is_last:
                left[0] -= 1
                if not left[0]:
                    done.set()

    begun = time.monotonic()
    for prompt in prompts:
        worker.submit(Request(prompt, SamplingParams(max_new_tokens=num_tokens), take))
    is_done = done.wait(120)
    seconds = time.monotonic() - begun
    worker.stop()
    if not bench.report.check("every client was answered", is_done, left=left[0]):
        return
    bench.report.add(
        f"server {num_clients} clients",
        tokens_per_s=num_clients * num_tokens / seconds,
        first_token_median_s=statistics.median(at - begun for at in first),
        warm_up_s=warm_up_s,
    )


def run_load(bench: Bench) -> None:
    """Saving is not timed; loading is, from files that the system has just written."""
    import audioflamingo as af

    model = build(bench)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        start = time.perf_counter()
        loaded = af.AudioFlamingo3ForConditionalGeneration.from_pretrained(
            folder, device_map=str(bench.device)
        )
        bench.synchronize()
        bench.report.add("load", s=time.perf_counter() - start, gb=loaded.get_memory_footprint() / 1e9)


def pack_on_device(model: Any, scheme: str) -> None:
    """Makes the layers of a model packed ones with random integers, where they are: quantizing takes minutes."""
    from audioflamingo.quantization.layers import empty_layer
    from audioflamingo.quantization.quantize_model import layer_formats
    from audioflamingo.quantization.schemes import as_config, with_quantization

    config = as_config(scheme)
    for name, format_ in layer_formats(model, config).items():
        module = model.get_submodule(name)
        std = float(module.weight.detach().std())
        layer = empty_layer(module, format_)
        layer.packed.random_(0, 256)
        if format_.is_float:
            layer.packed.bitwise_and_(0xBF)  # floats below 2, none of them NaN
            floats = torch.arange(64, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
            scale = std / float(floats.square().mean().sqrt())
        elif format_.group is None:
            scale = std / 74  # of uniform integers
        else:
            num_scales = layer.shape[1] // format_.group * 16
            layer.packed[:, :num_scales].random_(4, 15)
            scale = std / 43
        layer.scales.fill_(scale)
        model.set_submodule(name, layer)
    model.requires_grad_(False)
    model.config = model.model.config = with_quantization(model.config, config)
    model.kept_steps = None


def check_packed(bench: Bench, model: Any, scheme: str) -> bool:
    """Products with packed weights against those of the weights that they stand for, few rows and many."""
    from audioflamingo.quantization.quantize_model import packed_layers

    worst = {"few": 0.0, "many": 0.0}
    layers = [
        layer for name, layer in packed_layers(model).items() if "layers.0." in name or name == "lm_head"
    ]
    for layer in layers:
        weight = layer.dequantize()
        for num_rows in (1, 5, 16, 40, 64, 200):
            x = torch.randn(num_rows, layer.shape[1], device=bench.device).bfloat16()
            bias: Any = None if layer.bias is None else layer.bias.float()
            with torch.no_grad():
                expected = nn.functional.linear(x.float(), weight, bias)
                error = float((layer(x).float() - expected).norm() / expected.norm())
            kind = "few" if num_rows <= 64 else "many"
            worst[kind] = max(worst[kind], error)
    limit = 0.01 if bench.device.type == "cuda" else 0.03  # a CPU rounds activations to int8
    many_limit = (
        0.04 if scheme == "fp8" else limit
    )  # which are rounded to float8 where the card multiplies in it
    is_right = worst["few"] < limit and worst["many"] < many_limit
    return bench.report.check(
        f"{scheme} = dequantized", is_right, worst_of_few=worst["few"], of_many=worst["many"]
    )


def measure_products(bench: Bench, model: Any) -> None:
    """One product of each kind of the language model, alone: bytes of weights a second over those of a copy."""
    layer = model.model.language_model.layers[0]
    kinds = {
        "q_proj": layer.self_attn.q_proj,
        "k_proj": layer.self_attn.k_proj,
        "gate_proj": layer.mlp.gate_proj,
    }
    kinds |= {"down_proj": layer.mlp.down_proj, "lm_head": model.lm_head}
    for name, module in kinds.items():
        num_bytes = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        for num_rows in (1, 8, 64):
            shares = {}
            x = torch.randn(num_rows, module.in_features, device=bench.device).bfloat16()
            for kind in ("torch", "triton"):
                is_packed = not isinstance(module, nn.Linear)
                if (kind == "triton") == is_packed or (num_rows == 1 and not is_packed):
                    shares[kind] = (
                        num_bytes / graph_seconds(bench, module, x, kind == "triton") / bench.copy_bytes_s
                    )
            form = "packed" if not isinstance(module, nn.Linear) else "bf16"
            bench.report.add(f"product {form} {name} {num_rows}", mb=num_bytes / 1e6, **shares)


def graph_seconds(bench: Bench, module: nn.Module, x: Tensor, with_kernels: bool) -> float:
    """Seconds of a layer without its launch, from a graph of many. What fits into the cache looks too fast."""
    from audioflamingo.kernels.gpu import step_kernels

    context = step_kernels() if with_kernels else nullcontext()
    with torch.no_grad(), context:
        for _ in range(3):
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                module(x)
    return bench.seconds(graph.replay, 5, 2) / 20


def build_peer(bench: Bench) -> tuple[Any, str]:
    """The model of transformers, its weights random on the device; and how its rows end."""
    import transformers

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(bench.device):
            config = transformers.AudioFlamingo3Config(**configuration(bench.is_tiny))
            model = transformers.AudioFlamingo3ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model, f" transformers {transformers.__version__}"


def run_peer(bench: Bench) -> None:
    """The peer in eager mode."""
    model, who = build_peer(bench)
    with bench.report.part(f"encoder{who}"):
        measure_encoder(bench, model, who)
    with bench.report.part(f"first token{who}"):
        measure_first_token(bench, model, who)
    rows = bench.rows[:1] if bench.is_tiny else (1, 64)
    with bench.report.part(f"decode{who}"):
        measure_decode(bench, model, f"bf16{who}", rows)
    bench.report.add(f"peak memory{who}", gb=bench.peak_gb())


def run_compiled_peer(bench: Bench) -> None:
    """The peer with its static cache and compilation, if that runs."""
    model, who = build_peer(bench)
    measure_decode(bench, model, f"bf16 static compiled{who}", (1,), cache_implementation="static")


def compare(report: Report) -> None:
    """Ratios to transformers in the same run."""
    by_name = {row["name"]: row for row in report.rows}
    for name, row in list(by_name.items()):
        ours = by_name.get(name.split(" transformers")[0])
        if " transformers" not in name or ours is None or ours is row:
            continue
        for key in ("ms", "tokens_per_s"):
            if key in row and key in ours and row[key]:
                report.add(f"ratio {ours['name']}", ours_over_transformers=ours[key] / row[key], of=key)


def run_float(bench: Bench) -> None:
    """Everything about the model in bfloat16."""
    report = bench.report
    model = build(bench)
    with report.part("rows = alone"):
        check_rows_alone(bench, model)
    with report.part("captured = eager bf16"):
        check_captured(bench, model, "bf16")
    with report.part("decode bf16"):
        bench.free()
        measure_decode(bench, model, "bf16", bench.rows[:1], eos_token_id=[])
        report.add("peak memory bf16", gb=bench.peak_gb())
        measure_decode(bench, model, "bf16", bench.rows[1:], eos_token_id=[])
    with report.part("decode bf16 eager"):
        set_capturing(model, False)
        measure_decode(bench, model, "bf16 eager", bench.rows[:1], eos_token_id=[])
        set_capturing(model, True)
    for name, part in (("first token", measure_first_token), ("encoder", measure_encoder)):
        with report.part(name):
            part(bench, model, "")
    with report.part("second question"):
        measure_second_question(bench, model)
    if report.has_time("server"):
        with report.part("server"):
            measure_server(bench, model)
    if bench.device.type == "cuda" and report.has_time("products"):
        with report.part("products"):
            measure_products(bench, model)


def run_packed(bench: Bench, scheme: str) -> None:
    """Decoding with packed weights."""
    model = build(bench)
    pack_on_device(model, scheme)
    bench.free()
    if not check_packed(bench, model, scheme):
        return
    set_capturing(model, True)
    with bench.report.part(f"captured = eager {scheme}"):
        check_captured(bench, model, scheme)
    bench.free()
    measure_decode(bench, model, scheme, bench.rows[:1], eos_token_id=[])
    bench.report.add(f"peak memory {scheme}", gb=bench.peak_gb())
    measure_decode(bench, model, scheme, bench.rows[1:], eos_token_id=[])
    given = bench.inputs(bench.clips_s[1])
    run = lambda: answer(model, given, 1)  # noqa: E731
    bench.report.add(f"first token {bench.clips_s[1]} {scheme}", ms=1e3 * bench.seconds(run))
    if bench.device.type == "cuda":
        with bench.report.part(f"products {scheme}"):
            measure_products(bench, model)


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=460, help="when all of it ends")
    parser.add_argument("--only", nargs="*", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to see that the script runs")
    arguments = parser.parse_args()
    report = Report(arguments.output, arguments.seconds, torch.cuda.is_available() and not arguments.tiny)
    watch = report.watch()
    bench = Bench(report, arguments.tiny)
    with report.part("card"):
        measure_card(bench)
    for name, (part, needed_s) in PARTS.items():
        if (arguments.only is None or name in arguments.only) and report.has_time(name, needed_s):
            bench.free()
            with report.part(name):
                part(bench)
    watch.cancel()
    report.finish()
    sys.exit(report.has_failed)


# In the order of what one wants to know first, with the seconds that each may take
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "bf16": (run_float, 60),
    "int4": (partial(run_packed, scheme="int4"), 40),
    "transformers": (run_peer, 60),
    "int8": (partial(run_packed, scheme="int8"), 40),
    "fp8": (partial(run_packed, scheme="fp8"), 40),
    "load": (run_load, 60),
    "compiled transformers": (run_compiled_peer, 120),
}


if __name__ == "__main__":
    main()
