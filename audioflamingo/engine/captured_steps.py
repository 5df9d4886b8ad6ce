"""Decode steps that a GPU replays, as CUDA graphs.

Shapes are fixed, so a step of hundreds of launches is recorded once and started by one call, without Python in between.

A step feeds itself: it writes each row's token behind those that it holds, chooses the likeliest next one, and is then
ready to run again. Rows are filled up to 1, 2, 4, 8 ... with rows of no use, which stay on a slot of their own.

Everything works on a CPU too, where nothing is recorded: that is how it is checked without a GPU.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence as Rows
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from audioflamingo.engine.sampling import choose_tokens
from audioflamingo.engine.sequence import Sequence
from audioflamingo.errors import warn
from audioflamingo.kernels.gpu import step_kernels
from audioflamingo.kernels.host import to_device, to_host
from audioflamingo.network.af3 import AudioFlamingo3WithHead
from audioflamingo.network.decode_step import decode_step
from audioflamingo.network.kv import KVStore, KVView, PackedLayout, Span

MIN_WINDOW = (
    4096  # tokens of a row: attention splits keys into parts for so many; empty parts cost next to nothing
)
WINDOW_FACTOR = 8
WARM_UPS = 2  # before recording: libraries and kernels choose and load themselves


class DecodeStep:
    """One decode step for so many rows; inputs and outputs stay where they are.

    Args:
        model: in evaluation mode, on one device.
        store: holds the rows.
        num_rows: R.
        window: no row has more tokens.
        scratch: a slot that belongs to nobody, for rows of no use.

    Attributes:
        num_rows, window: see above.
        tokens: the last token of each row, int64 `(R,)`.
        logits: of the last run, float32 `(R, V)`.
        chosen: the likeliest tokens by them, int64 `(R,)`; `NO_TOKEN` where the logits are not finite.
    """

    def __init__(
        self, model: AudioFlamingo3WithHead, store: KVStore, num_rows: int, window: int, scratch: int
    ) -> None:
        self.num_rows = num_rows
        self.window = window
        self._model = weakref.ref(model)  # which keeps this step
        self._store = store
        self._scratch = scratch
        device = model.device
        self._numbers = torch.zeros(4, num_rows, dtype=torch.long, device=device)
        self.tokens, self._starts, self._positions, self._advance = self._numbers.unbind()
        self._offsets = torch.arange(num_rows + 1, device=device)
        self.logits: Tensor | None = None
        self.chosen: Tensor | None = None
        self._graph: Any = None
        self.load([], [])

    def load(self, tokens: Rows[int], spans: Rows[Span]) -> None:
        """Says which rows run next.

        Args:
            tokens: the last token of each.
            spans: where they are, with what they held before the token; at most R.
        """
        rest = self.num_rows - len(spans)
        numbers = [
            [*tokens, *[0] * rest],
            [*(span.start for span in spans), *[self._scratch] * rest],
            [*(span.length for span in spans), *[0] * rest],
            [*[1] * len(spans), *[0] * rest],
        ]
        self._numbers.copy_(to_device(numbers, self._numbers.device))

    def run(self) -> None:
        """Runs the step: eagerly, or as it was recorded."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def feed(self, tokens: Tensor) -> None:
        """Lets the rows go on with other tokens than the likeliest ones, int64 `(n,)`."""
        self.tokens[: len(tokens)].copy_(tokens.clamp(min=0))

    def _run(self) -> None:
        model, starts, positions = self._model(), self._starts, self._positions
        assert model is not None
        layout = PackedLayout(
            positions.clone(), starts + positions, starts, positions + 1, self._offsets, window=self.window
        )
        self.logits = decode_step(model, self.tokens, KVView(self._store, layout))
        self.chosen = choose_tokens(self.logits, None)
        self.tokens.copy_(
            self.chosen.clamp(min=0)
        )  # a row that cannot go on must still not name a token that is none
        self._positions.add_(self._advance)

    def record(self, memory: Any, with_kernels: bool = True) -> None:
        """Records the step; its rows are then none.

        Args:
            memory: pool that all graphs of a store share.
            with_kernels: take this package's kernels for the small work.
        """
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        with step_kernels() if with_kernels else nullcontext():
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device: only what this one does is recorded.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._run()
        self._graph = graph


@dataclass
class Flight:
    """A step that runs, or has run, and whose tokens were not looked at.

    Attributes:
        rows: the sequences.
        ids: their tokens, on the host once `landed` has happened.
        landed: None on a CPU.
    """

    rows: list[Sequence]
    ids: Tensor
    landed: Any = None

    @classmethod
    def of(cls, rows: list[Sequence], chosen: Tensor) -> Flight:
        """Starts to bring the tokens of rows to the host."""
        if not chosen.is_cuda:
            return cls(rows, chosen.clone())
        ids = torch.empty(len(chosen), dtype=torch.long, device="cpu", pin_memory=True)
        ids.copy_(chosen, non_blocking=True)
        return cls(rows, ids, torch.cuda.current_stream(chosen.device).record_event())

    def tokens(self) -> list[int]:
        """The tokens; waits for the step."""
        if self.landed is not None:
            self.landed.synchronize()
        return list(to_host(self.ids))


class StoreSteps:
    """The steps of a model over one store, by number of rows and window; recorded when they are first needed.

    Args:
        owner: the model's.
        model: runs.
        store: the keys and values.
        scratch: a slot of the store that belongs to nobody.

    Attributes:
        store, scratch: see above.
        memory: pool that the graphs share; None before there is one.
    """

    def __init__(
        self, owner: CapturedSteps, model: AudioFlamingo3WithHead, store: KVStore, scratch: int
    ) -> None:
        self.store = store
        self.scratch = scratch
        self.memory: Any = None  # of the graphs; of other stores', which other threads may run, it is apart
        self._owner = owner
        self._model = weakref.ref(model)
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        self._buffer: Tensor | None = None  # of the store, as it was when the steps were recorded

    def step(self, num_rows: int, num_tokens: int) -> DecodeStep | None:
        """The step for so many rows of at most so many tokens; None where steps run eagerly."""
        buffer, model = self.store.keys[0], self._model()
        if buffer is None or model is None or self._owner.has_failed:
            return None
        if buffer is not self._buffer:  # the store grew, and moved
            self._steps, self._buffer, self.memory = {}, buffer, None
        num_rows = 1 << (num_rows - 1).bit_length()
        window = MIN_WINDOW
        while window < num_tokens:
            window *= WINDOW_FACTOR
        key = num_rows, window
        if key not in self._steps:
            made = self._owner.make(model, self, key)
            if made is None:
                return None
            self._steps[key] = made
        return self._steps[key]


class CapturedSteps:
    """What a model keeps of its captured decode steps.

    A store that is given back stays here with its steps for the next engine, because recording them anew would take
    longer than a short answer.

    Args:
        is_recorded: False runs the same steps without recording them, which is what a test on a CPU does.

    Attributes:
        num_recorded: steps that were recorded.
        recording_s: seconds that took.
        has_failed: steps run eagerly, since something failed.
    """

    def __init__(self, is_recorded: bool = True) -> None:
        self.num_recorded = 0
        self.recording_s = 0.0
        self.has_failed = False
        self._is_recorded = is_recorded
        self._kept: list[StoreSteps] = []
        self._state: tuple[Any, ...] = ()  # of the model, as it was when the steps were recorded
        self._has_kernels = True

    def __reduce__(self) -> Any:
        """A copy of a model has recorded nothing yet."""
        return CapturedSteps, (self._is_recorded,)

    def lend(self, model: AudioFlamingo3WithHead, num_slots: int | None) -> StoreSteps:
        """A store with its steps, for one engine: one that is there if it may have any size, else a new one.

        Args:
            model: whose steps they are.
            num_slots: of the store; None for one that grows.
        """
        state = state_of(model)
        if state != self._state:
            self._kept, self._state = [], state
        if num_slots is None and self._kept:
            return self._kept.pop()
        num_layers = model.config.text_config.num_hidden_layers
        store = KVStore(num_layers, 1 + (num_slots or 0), is_filled=num_slots is not None)
        return StoreSteps(self, model, store, scratch=0)

    def give_back(self, steps: StoreSteps) -> None:
        """Takes a store back whose values are all finite."""
        if not self.has_failed:
            self._kept = [steps]

    def make(
        self, model: AudioFlamingo3WithHead, steps: StoreSteps, shape: tuple[int, int]
    ) -> DecodeStep | None:
        """A step for so many rows and such a window, recorded; None, after one warning, if that fails."""
        start = time.perf_counter()
        try:
            step = DecodeStep(model, steps.store, *shape, steps.scratch)
            if self._is_recorded:
                self._record(step, steps)
                self.num_recorded += 1
        except Exception as error:  # whatever a library may have against it: eager steps still work
            self.fail(_reason(error))
            return None
        self.recording_s += time.perf_counter() - start
        return step

    def _record(self, step: DecodeStep, steps: StoreSteps) -> None:
        """Records a step, with this package's kernels if they run: triton needs a C compiler, which may be missing."""
        failure = None
        if self._has_kernels:
            try:
                steps.memory = steps.memory or torch.cuda.graph_pool_handle()
                step.record(steps.memory)
                return
            except Exception as error:
                failure, self._has_kernels, steps.memory = error, False, None
        steps.memory = steps.memory or torch.cuda.graph_pool_handle()
        step.record(steps.memory, with_kernels=False)
        if failure is not None:
            warn(f"decode steps are captured without this package's kernels ({_reason(failure)}).")

    def fail(self, reason: str) -> None:
        """Goes on eagerly."""
        self.has_failed = True
        self._kept = []
        warn(
            f"decode steps could not be captured ({reason}); they run eagerly, which gives the same tokens more slowly."
        )


def _reason(error: BaseException) -> str:
    """What went wrong first: that a recording was broken off says nothing."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def state_of(model: AudioFlamingo3WithHead) -> tuple[Any, ...]:
    """What a recorded step has taken for granted of a model; it is worthless once that has changed.

    Where the weights are, peft's adapters as they are switched, and inference mode: what was made in it cannot be
    written to outside of it.
    """
    weights = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    adapters = [
        (repr(module.active_adapters), module.disable_adapters, module.merged, repr(module.scaling))
        for module in model.modules()
        if hasattr(type(module), "disable_adapters")
    ]
    return (*weights, *adapters, torch.is_inference_mode_enabled())


def captured_steps_of(model: AudioFlamingo3WithHead) -> CapturedSteps | None:
    """What a model keeps of its captured steps; None for one that is not to capture any, or cannot."""
    if not model.compiles_steps:
        return None
    if model.kept_steps is None:
        model.kept_steps = CapturedSteps()
        if (reason := why_not(model)) is not None:
            model.kept_steps.fail(reason)
    steps: CapturedSteps = model.kept_steps
    return None if steps.has_failed else steps


def why_not(model: AudioFlamingo3WithHead) -> str | None:
    """Why the decode steps of a model cannot be captured; None if they can."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        return f"the model lies on {len(devices)} devices"
    (device,) = devices
    if device.type != "cuda":
        return f"the model is on {device}, CUDA graphs are of NVIDIA GPUs"
    if device.index != torch.cuda.current_device():
        return f"the model is on {device}, which is not torch's current device: torch.cuda.set_device({device.index})"
    return None


def sizes_up_to(max_rows: int) -> list[int]:
    """The numbers of rows that steps are recorded for."""
    return [1 << power for power in range(math.ceil(math.log2(max_rows)) + 1)]
