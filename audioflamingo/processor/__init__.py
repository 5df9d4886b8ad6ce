"""From conversations and audio to a batch for the model, and from generated ids back to text.

conversation (checked) -> chat_template (rendered) -> tokenizer (ids) and clips (windows) -> batch; framing strips what
the model wraps around a transcript.
"""

from audioflamingo.processor.batch import BatchFeature
from audioflamingo.processor.processor import AudioFlamingo3Processor, AutoProcessor
from audioflamingo.processor.tokenizer import StreamDecoder, Tokenizer

__all__ = ["AudioFlamingo3Processor", "AutoProcessor", "BatchFeature", "StreamDecoder", "Tokenizer"]
