"""The module that is trained: the model, a CTC head beside it, and the losses of one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.network.encoder import POOL
from audioflamingo.network.loss import causal_lm_loss
from audioflamingo.training.config import CTC_ALPHABET

CTC_BLANK = 0
AUDIO_INPUTS = ("input_features", "input_features_mask")


class TrainingModule(nn.Module):
    """AF3 and, where asked for, a linear layer to characters on the projector's output.

    The head helps training and is not part of the saved model.

    Args:
        model: trained in place.
        uses_ctc: build the head.
    """

    def __init__(self, model: AudioFlamingo3ForConditionalGeneration, uses_ctc: bool = False) -> None:
        super().__init__()
        self.model = model
        self.ctc_head: nn.Linear | None = None
        if uses_ctc:
            width = model.config.text_config.hidden_size
            self.ctc_head = nn.Linear(width, len(CTC_ALPHABET) + 1, dtype=model.dtype, device=model.device)

    def forward(
        self, batch: dict[str, Any], uses_answers: bool = True, ctc_layer: int = 0
    ) -> dict[str, Tensor]:
        """Losses of a batch of `BatchEncoder`.

        Args:
            batch: tensors by name.
            uses_answers: compute the answer's loss; otherwise the language model is not run.
            ctc_layer: layer of the language model that the CTC head reads; 0 is the projector.

        Returns:
            `answer`: cross-entropy summed over the labelled tokens, by the rows' weights. `ctc`: CTC loss summed over
            the clips. Each only where the batch has it.
        """
        losses: dict[str, Tensor] = {}
        projected = None
        if "audio_rows" in batch:
            rows = batch["audio_rows"].to(self.model.dtype)
            lengths, numbers = batch["audio_windows"]
            if "audio_layers" in batch:
                tower: Any = self.model.model.audio_tower
                rows = tower.last_layers(rows, lengths, batch["audio_layers"])
                lengths = [length // POOL for length in lengths]
            projected = self.model.model.project(rows, lengths, numbers)  # (A, D)
        if uses_answers:
            output = self._run(batch, projected, output_hidden_states=ctc_layer > 0)
            head, hidden = self.model.lm_head, output.last_hidden_state
            loss = causal_lm_loss(hidden, batch["labels"], head, batch["answer_weights"])
            losses["answer"] = loss * batch["num_labels"]
            projected = output.audio_hidden_states if projected is None else projected
            if ctc_layer and projected is not None:
                is_audio = batch["input_ids"] == self.model.config.audio_token_id
                projected = output.hidden_states[ctc_layer][is_audio]  # (A, D)
        elif projected is None and "input_features" in batch:
            inputs = (batch["input_ids"], batch["input_features"], batch["input_features_mask"])
            projected = self.model.model.hear(*inputs).pooler_output
        if self.ctc_head is not None and projected is not None and "ctc_spans" in batch:
            losses["ctc"] = self._ctc_loss(batch, projected)
        if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses.values()):
            # A text-only batch while only audio parts are trained: a gradient of zero, so that backward runs.
            zero = sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)
            losses["answer"] = losses["answer"] + zero if "answer" in losses else torch.as_tensor(zero)
        return losses

    def _run(self, batch: dict[str, Any], projected: Tensor | None, output_hidden_states: bool) -> Any:
        """The hidden states of a batch: from its audio on, or from the projected rows of its audio."""
        audio = {key: batch[key] for key in AUDIO_INPUTS if key in batch}
        if projected is not None:
            audio = {"audio_embeds": projected}
        return self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=output_hidden_states,
            **audio,
        )

    def _ctc_loss(self, batch: dict[str, Any], projected: Tensor) -> Tensor:
        """CTC (Graves et al. 2006) in float32; clips with more characters than audio tokens count nothing."""
        assert self.ctc_head is not None
        starts, lengths = batch["ctc_spans"].unbind(1)
        clips = [projected[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        logits = self.ctc_head(pad_sequence(clips))  # (T, K, C)
        return F.ctc_loss(
            F.log_softmax(logits.float(), dim=-1),
            batch["ctc_targets"],
            lengths,
            batch["ctc_lengths"],
            blank=CTC_BLANK,
            reduction="sum",
            zero_infinity=True,
        )


def move_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a batch on a device; other entries as they are."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
