"""Why an answer ended: `"stop"` by itself, `"length"` because it was the longest allowed, `"loop"` in repetition.

By itself, so that who only reads transcripts loads nothing heavy.
"""

from __future__ import annotations

from typing import Literal

FinishReason = Literal["stop", "length", "loop"]
