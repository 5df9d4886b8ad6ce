"""Projected audio that is kept, so that a clip which was encoded once is not encoded again.

Windows of 30 s are kept one by one, since each is encoded alone: clips that share windows share their work. The key
is the content that the encoder sees, so it does not matter where a clip came from.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

DEFAULT_MAX_BYTES = 256_000_000  # 47 windows (23 minutes) of the published model in bfloat16


class ClipCache:
    """Keeps the projected audio tokens of windows, the least recently used go first.

    It belongs to one model with fixed weights: call `clear` after changing them (training, adapters). Threads may
    share it; two that meet the same new window at the same time may both encode it.

    Args:
        max_bytes: most memory that the kept tokens take. 0 keeps nothing.

    Attributes:
        num_hits: windows that were found.
        num_misses: windows that were encoded.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0

    @property
    def is_off(self) -> bool:
        """Whether nothing is kept."""
        return self._max_bytes == 0

    def clear(self) -> None:
        """Forgets everything, for example because the weights changed."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def get(self, key: bytes) -> Tensor | None:
        """The tokens `(A, D)` of a window, if they are kept; see `AudioWindow.key`."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.num_hits += 1
            return self._kept.get(key)

    def put(self, key: bytes, tokens: Tensor) -> None:
        """Keeps the tokens `(A, D)` of a window, in a tensor of their own."""
        with self._lock:
            self.num_misses += 1
            if key in self._kept or tokens.nbytes > self._max_bytes:
                return
            self._kept[key] = tokens
            self.num_bytes += tokens.nbytes
            while self.num_bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.num_bytes -= oldest.nbytes
