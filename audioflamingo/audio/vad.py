"""Voice activity: the probability of speech in each 32 ms of a waveform, as a stream.

The network is Silero VAD's (MIT licence, https://github.com/snakers4/silero-vad), with the weights of its
wheel. Its own code runs one frame at a time; here a block of frames goes through the convolutions together
and through the recurrent layer in one call, with the same result, 10 times as fast.
"""

from __future__ import annotations

import importlib.util
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audioflamingo.errors import MissingDependencyError

VAD_FRAME = 512  # samples at 16 kHz: 32 ms
CONTEXT = 64  # samples of the frame before that the network also sees
FRAMES_A_BLOCK = 256  # 8.2 s go through the network together

State = tuple[Tensor, Tensor]


class SileroVad(nn.Module):
    """Silero VAD for 16 kHz."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.encoder = nn.ModuleList(
            nn.Conv1d(channels_in, channels_out, 3, stride=stride, padding=1)
            for channels_in, channels_out, stride in ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        )
        self.rnn = nn.LSTM(128, 128, batch_first=True)
        self.decoder = nn.Conv1d(128, 1, 1)

    def forward(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs n successive frames.

        Args:
            frames: `(n, CONTEXT + VAD_FRAME)` float32 at 16 kHz; each starts with the end of the one before.
            state: what the call before returned; None at the start of the audio.

        Returns:
            The probability of speech in each frame `(n,)`, and the state to go on from.
        """
        spectrum = self.stft(F.pad(frames, (0, CONTEXT), mode="reflect")[:, None])  # (n, 258, 4)
        hidden = torch.hypot(spectrum[:, :129], spectrum[:, 129:])  # (n, 129, 4)
        for layer in self.encoder:
            hidden = layer(hidden).relu()
        hidden, state = self.rnn(hidden[None, :, :, 0], state)  # (1, n, 128)
        assert state is not None
        return self.decoder(hidden[0].relu()[:, :, None]).sigmoid().flatten(), state


@lru_cache(maxsize=1)
def load_vad() -> SileroVad:
    """Loads the weights from the installed package `silero-vad`, whose code is not imported: it sets threads.

    Raises:
        MissingDependencyError: the package is absent, or holds another network.
    """
    # The submodule search path is found without running the package.
    spec = importlib.util.find_spec("silero_vad")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    path = next(
        (p for p in (Path(folder) / "data" / "silero_vad.jit" for folder in folders) if p.exists()), None
    )
    install = "pip install 'silero-vad>=6.2,<7'"
    if path is None:
        raise MissingDependencyError(f"finding speech needs the package silero-vad: {install}")
    names = {"stft.weight": "stft.forward_basis_buffer"}
    names |= {
        f"encoder.{i}.{kind}": f"encoder.{i}.reparam_conv.{kind}"
        for i in range(4)
        for kind in ("weight", "bias")
    }
    names |= {
        f"rnn.{kind}_l0": f"decoder.rnn.{kind}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    names |= {f"decoder.{kind}": f"decoder.decoder.2.{kind}" for kind in ("weight", "bias")}
    model = SileroVad()
    try:
        stored = _read_scripted(path)
        model.load_state_dict({ours: stored[f"_model.{theirs}"] for ours, theirs in names.items()})
    except (KeyError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise MissingDependencyError(
            f"this version of silero-vad holds another network: {install} ({error})"
        ) from error
    return model.eval().requires_grad_(False)


class _Scripted:
    """Stands for an object of a TorchScript file, whose class only its own code defines."""

    def __init__(self, *_: Any) -> None:
        pass

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _Scripted):
                yield from value.tensors(f"{prefix}{name}.")


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


class _ScriptedUnpickler(pickle.Unpickler):
    """Reads the tensors of a TorchScript file: nothing in it is run."""

    dtypes: ClassVar = {"FloatStorage": torch.float32, "LongStorage": torch.int64}

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return _rebuild
        return name if name in self.dtypes else _Scripted

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, flat; `pid`: its kind, its dtype, its file, its device, and how many elements it has."""
        _, kind, key, _, count = pid
        if count == 0:
            return torch.empty(0, dtype=self.dtypes[kind])
        return torch.frombuffer(
            bytearray(self._archive.read(f"{self._root}/data/{key}")), dtype=self.dtypes[kind]
        )


def _read_scripted(path: Path) -> dict[str, Tensor]:
    """Tensors of a TorchScript file by name; `torch.jit.load` would compile its code first, which takes 0.1 s."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return dict(_ScriptedUnpickler(archive, root).load().tensors())


def frames_of(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cuts a stream of samples (..., n) into blocks of whole frames; the last one may be of any length."""
    pending: list[np.ndarray] = []
    num_pending, size = 0, VAD_FRAME * FRAMES_A_BLOCK
    for block in blocks:
        pending.append(block)
        num_pending += block.shape[-1]
        if num_pending >= size:
            joined = np.concatenate(pending, axis=-1)
            num_whole = num_pending // size * size
            for start in range(0, num_whole, size):
                yield joined[..., start : start + size]
            pending, num_pending = [joined[..., num_whole:].copy()], num_pending - num_whole
    if num_pending:
        yield np.concatenate(pending, axis=-1)


class SpeechDetector:
    """Scores the successive blocks of one source; keeps the network's state between them."""

    def __init__(self) -> None:
        self._model = load_vad()
        self._state: State | None = None
        self._context = torch.zeros(CONTEXT)

    @torch.no_grad()
    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Probability of speech in each frame of `block` (samples,), float32 (ceil(samples / VAD_FRAME),)."""
        samples = torch.tensor(block, dtype=torch.float32)
        samples = F.pad(samples, (0, -len(block) % VAD_FRAME))
        frames = torch.cat([self._context, samples]).unfold(0, CONTEXT + VAD_FRAME, VAD_FRAME)
        self._context = samples[-CONTEXT:]
        probabilities, self._state = self._model(frames, self._state)
        return probabilities.numpy()


class SoundDetector:
    """In place of `SpeechDetector`: 1 for every frame that is not digital silence, 0 for silence."""

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """1 or 0 for each frame of `block`, float32 (ceil(samples / VAD_FRAME),)."""
        return (frame_levels(block) > 0).astype(np.float32)


def frame_levels(block: np.ndarray) -> np.ndarray:
    """Root mean square of each frame of `block` (samples,), float32; the last frame is filled with zeros."""
    frames = np.pad(block, (0, -len(block) % VAD_FRAME)).reshape(-1, VAD_FRAME)
    return np.sqrt(np.mean(np.square(frames), axis=1, dtype=np.float64)).astype(np.float32)
