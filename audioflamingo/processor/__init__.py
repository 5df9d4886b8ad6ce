"""From conversations and audio to a batch for the model, and from generated ids back to text.

conversation (checked) -> chat_template (rendered) -> tokenizer (ids) and clips (windows) -> prompt -> collate (padded);
prompt_maker goes that way, processor is its public face.
"""

from audioflamingo.processor.collate import BatchFeature, collate, unbatch
from audioflamingo.processor.processor import AudioFlamingo3Processor, AutoProcessor
from audioflamingo.processor.prompt import AudioWindow, Prompt, PromptText
from audioflamingo.processor.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "AudioFlamingo3Processor",
    "AudioWindow",
    "AutoProcessor",
    "BatchFeature",
    "Prompt",
    "PromptText",
    "StreamDecoder",
    "Tokenizer",
    "collate",
    "unbatch",
]
