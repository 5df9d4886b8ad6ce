"""What is lost of a damaged file: an error, or, where the caller allows it, one warning at the end."""

from __future__ import annotations

from audioflamingo.errors import AudioError, warn


class Loss:
    """What is found to be wrong with one source.

    Args:
        name: what messages call it.
        is_allowed: go on with what is left.
    """

    def __init__(self, name: str, is_allowed: bool) -> None:
        self._name = name
        self.is_allowed = is_allowed
        self._reasons: list[str] = []
        self._num_packets = self._num_bytes = 0
        self._packets_s = 0.0

    def note(self, reason: str, cause: BaseException | None = None) -> None:
        """Notes what is wrong.

        Raises:
            AudioError: that is not allowed.
        """
        if not self.is_allowed:
            raise AudioError(
                f"{self._name} is cut short or damaged: {reason}. Get the whole file, or take what is left of it "
                "with allow_damaged=True (--allow-damaged)."
            ) from cause
        self._reasons.append(reason)

    def note_packet(self, num_bytes: int, duration_s: float) -> None:
        """Notes a piece that did not decode, where that is allowed."""
        self._num_packets += 1
        self._num_bytes += num_bytes
        self._packets_s += duration_s

    def finish(self, heard_s: float, announced_s: float | None) -> None:
        """Warns of all that was noted.

        Args:
            heard_s: seconds that were decoded.
            announced_s: seconds that the file should hold; None if it does not say.
        """
        reasons = list(self._reasons)
        if self._num_packets:
            reasons.append(
                f"{self._num_packets} pieces of {self._num_bytes} bytes together, {self._packets_s:.3f} s of sound, do "
                "not decode"
            )
        if not reasons:
            return
        lost = "how much was lost the file does not say"
        if announced_s is not None:
            lost = f"{max(0.0, announced_s - heard_s):.3f} of {announced_s:.3f} s are lost"
        warn(
            f"{self._name} is cut short or damaged: {'; '.join(reasons)}. {heard_s:.3f} s are heard; {lost}."
        )
