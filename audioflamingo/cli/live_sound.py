"""Where sound comes from while it is made: a microphone, or raw samples through a pipe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from audioflamingo.cli.terminal import Terminal
from audioflamingo.errors import ArgumentError, AudioError, MissingDependencyError, require

if TYPE_CHECKING:
    import numpy as np

BLOCK_S = 0.1
MAX_WAITING_S = 300.0  # sound that waits for a slow model


class LiveSound:
    """Blocks of sound, taken in by a thread, given out as 16 kHz samples.

    `stop` may be called from a signal handler: what was taken in until then is still given out.

    Args:
        rate: Hz of the 16-bit samples that come in.
    """

    def __init__(self, rate: float) -> None:
        from audioflamingo.audio.live_audio import LiveAudio

        self._audio = LiveAudio("pcm16", rate)
        self._coming: SimpleQueue[bytes | Exception | None] = SimpleQueue()
        self._room = threading.Semaphore(int(MAX_WAITING_S / BLOCK_S))
        self.lost_s = 0.0

    def put(self, data: bytes, waits: bool) -> None:
        """Takes a block of `BLOCK_S`; where there is no room it waits, or the block is lost and counted."""
        if self._room.acquire(blocking=waits):
            self._coming.put(data)
        else:
            self.lost_s += self._audio.duration_s(len(data))

    def stop(self, error: Exception | None = None) -> None:
        """Ends the blocks."""
        self._coming.put(error)

    def blocks(self) -> Iterator[np.ndarray]:
        """All that has come in since the last block; waits where nothing has.

        Raises:
            AudioError: the source broke off.
        """
        rest = b""
        while True:
            pieces, is_over, error = self._take()
            data = rest + b"".join(pieces)
            whole = len(data) // 2 * 2
            rest = data[whole:]
            if whole:
                yield self._audio.put(data[:whole])
            if is_over:
                yield self._audio.end()
                if error is not None:
                    raise error
                return

    def _take(self) -> tuple[list[bytes], bool, Exception | None]:
        pieces: list[bytes] = []
        item = self._coming.get()
        while True:
            if not isinstance(item, bytes):
                return pieces, True, item
            self._room.release()
            pieces.append(item)
            try:
                item = self._coming.get_nowait()
            except Empty:
                return pieces, False, None


def listen_to_pipe(read: Callable[[int], bytes], rate: float) -> LiveSound:
    """Sound from raw mono samples, 16-bit little-endian. Whoever writes them waits for a slow model.

    Args:
        read: gives up to so many bytes; none at the end.
        rate: Hz.
    """
    sound = LiveSound(rate)

    def run() -> None:
        error: Exception | None = None
        try:
            is_first = True
            while data := read(int(rate * BLOCK_S) * 2):
                if is_first and data[:4] in (b"RIFF", b"fLaC", b"OggS", b"ID3\x03", b"ID3\x04"):
                    raise AudioError(
                        "standard input is an audio file, not raw samples; put 'ffmpeg -i - -f s16le -ar 16000 -ac 1 "
                        "-' between, or use af3 transcribe -."
                    )
                is_first = False
                sound.put(data, waits=True)
        except (OSError, AudioError) as caught:
            error = caught
        sound.stop(error)

    threading.Thread(target=run, daemon=True, name="pipe").start()
    return sound


class Microphone:
    """An open microphone; a context manager.

    Args:
        name: number or part of the name of the device; None for the system's own choice.

    Attributes:
        sound: what it hears.

    Raises:
        MissingDependencyError: `sounddevice` is absent.
        ArgumentError: there is no such microphone.
    """

    def __init__(self, name: str | None) -> None:
        try:
            sounddevice = require("sounddevice", "microphone")
        except OSError as error:  # it is there, and the library that it stands on is not
            message = f"the microphone needs PortAudio, on Debian: apt install libportaudio2 ({error})"
            raise MissingDependencyError(message) from None
        device = int(name) if name is not None and name.isdecimal() else name
        try:
            about = sounddevice.query_devices(device, "input")
            self.name, rate = about["name"], about["default_samplerate"]
            self.sound = LiveSound(rate)
            self._stream = sounddevice.RawInputStream(
                samplerate=rate,
                blocksize=int(rate * BLOCK_S),
                device=device,
                channels=1,
                dtype="int16",
                callback=self._take,
            )
        except (ValueError, sounddevice.PortAudioError) as error:
            known = [d["name"] for d in sounddevice.query_devices() if d["max_input_channels"]]
            raise ArgumentError(
                f"the microphone cannot be opened ({error}); this machine has {', '.join(known) or 'none'}. Name one "
                "with --microphone, or send raw samples through a pipe: af3 listen -."
            ) from None

    def __enter__(self) -> LiveSound:
        self._stream.start()
        return self.sound

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        if self.sound.lost_s:
            Terminal.say(
                f"warning: {self.sound.lost_s:.1f} s were not heard: the model was more than {MAX_WAITING_S:g} s "
                "behind. Use a smaller model or --draft-s 0."
            )

    def _take(self, data: Any, _frames: int, _time: Any, _status: Any) -> None:
        self.sound.put(bytes(data), waits=False)
