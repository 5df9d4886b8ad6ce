"""From logits to answers.

options and request (checked) -> generate (the loop) -> sampling (logits to tokens), stopping; beam_search beside it.
"""

from audioflamingo.generation.generate import GenerateOutput, GenerationMixin, GenerationStep
from audioflamingo.generation.options import GenerateOptions
from audioflamingo.generation.streamers import TextStreamer

__all__ = ["GenerateOptions", "GenerateOutput", "GenerationMixin", "GenerationStep", "TextStreamer"]
