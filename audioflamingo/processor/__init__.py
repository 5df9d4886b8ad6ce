"""From conversations and audio to a batch for the model, and from generated ids back to text.

conversation (checked) -> chat_template (rendered) -> tokenizer (ids) and clips (windows) -> prompt -> collate (padded);
prompt_maker goes that way, processor is its public face.
"""

from audioflamingo.processor.auto import AutoProcessor
from audioflamingo.processor.collate import BatchFeature, collate, unbatch
from audioflamingo.processor.music_flamingo import MusicFlamingoProcessor
from audioflamingo.processor.processor import AudioFlamingo3Processor
from audioflamingo.processor.prompt import AudioWindow, Prompt, PromptText
from audioflamingo.processor.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "AudioFlamingo3Processor",
    "AudioWindow",
    "AutoProcessor",
    "BatchFeature",
    "MusicFlamingoProcessor",
    "Prompt",
    "PromptText",
    "StreamDecoder",
    "Tokenizer",
    "collate",
    "unbatch",
]
