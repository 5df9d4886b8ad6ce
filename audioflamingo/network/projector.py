"""The projector from the encoder's width to the language model's (arXiv 2507.08128, section 3.1)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from audioflamingo.config import AudioFlamingo3Config
from audioflamingo.kernels.modules import Linear


class AudioFlamingo3MultiModalProjector(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: AudioFlamingo3Config) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = Linear(config.audio_config.hidden_size, width, bias=config.projector_bias)
        self.linear_2 = Linear(width, width, bias=config.projector_bias)

    def forward(self, audio_features: Tensor) -> Tensor:
        """Maps `(..., D_audio)` to `(..., D_text)`."""
        return self.linear_2(F.gelu(self.linear_1(audio_features)))
