"""The module that is trained: the model, a CTC head beside it, and the losses of one batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from audioflamingo.model import AudioFlamingo3ForConditionalGeneration
from audioflamingo.network.encoder import POOL
from audioflamingo.network.loss import causal_lm_loss
from audioflamingo.network.outputs import LanguageModelOutput
from audioflamingo.training.batches import Batch, CtcTargets
from audioflamingo.training.training_config import CTC_ALPHABET

CTC_BLANK = 0


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

    def forward(self, batch: Batch, uses_answers: bool = True, ctc_layer: int = 0) -> dict[str, Tensor]:
        """Losses of a batch of `BatchEncoder`.

        Args:
            batch: on the model's device.
            uses_answers: compute the answer's loss; otherwise the language model is not run.
            ctc_layer: layer of the language model that the CTC head reads; 0 is the projector.

        Returns:
            `answer`: cross-entropy summed over the labelled tokens, by the rows' weights. `ctc`: CTC loss summed over
            the clips. Each only where the batch has it.
        """
        losses: dict[str, Tensor] = {}
        projected = None
        if batch.audio_rows is not None:
            rows = batch.audio_rows.to(self.model.dtype)
            lengths = batch.audio_lengths
            if batch.audio_layers is not None:
                rows = self.model.model.audio_tower.last_layers(rows, lengths, batch.audio_layers)
                lengths = [length // POOL for length in lengths]
            projected = self.model.model.project(rows, lengths, batch.window_index)  # (A, D)
        if uses_answers:
            assert batch.input_ids is not None
            assert batch.labels is not None
            output = self._run(batch, projected, output_hidden_states=ctc_layer > 0)
            head, hidden = self.model.lm_head, output.last_hidden_state
            loss = causal_lm_loss(hidden, batch.labels, head, batch.answer_weights)
            losses["answer"] = loss * batch.num_labels
            projected = output.audio_hidden_states if projected is None else projected
            if output.hidden_states is not None and projected is not None:
                is_audio = batch.input_ids == self.model.config.audio_token_id
                projected = output.hidden_states[ctc_layer][is_audio]  # (A, D)
        elif projected is None and batch.input_features is not None:
            audio = self.model.model.hear(batch.input_ids, batch.input_features, batch.input_features_mask)
            projected = audio.pooler_output
        if self.ctc_head is not None and projected is not None and batch.ctc is not None:
            losses["ctc"] = _ctc_loss(batch.ctc, self.ctc_head, projected)
        if torch.is_grad_enabled() and (unused := self._unused(batch, "ctc" in losses)):
            zero = torch.stack([parameter.sum() * 0 for parameter in unused]).sum()
            losses["answer"] = losses["answer"] + zero if "answer" in losses else zero
        return losses

    def _unused(self, batch: Batch, has_ctc: bool) -> list[nn.Parameter]:
        """Trained parameters that a batch without audio, or without characters, does not reach.

        They get a gradient of zero: so that backward runs where nothing else is trained, and so that processes that
        share their gradients (FSDP) exchange the same ones whatever their batches hold.
        """
        parts: list[nn.Module] = []
        if batch.input_features is None and batch.audio_rows is None:
            parts += [self.model.model.audio_tower, self.model.model.multi_modal_projector]
        if self.ctc_head is not None and not has_ctc:
            parts.append(self.ctc_head)
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def _run(self, batch: Batch, projected: Tensor | None, output_hidden_states: bool) -> LanguageModelOutput:
        """The hidden states of a batch: from its audio on, or from the projected rows of its audio."""
        uses_windows = projected is None
        return self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            input_features=batch.input_features if uses_windows else None,
            input_features_mask=batch.input_features_mask if uses_windows else None,
            audio_embeds=projected,
            output_hidden_states=output_hidden_states,
        )


def _ctc_loss(ctc: CtcTargets, head: nn.Linear, projected: Tensor) -> Tensor:
    """CTC (Graves et al. 2006) in float32; clips with more characters than audio tokens count nothing."""
    starts, lengths = ctc.spans.unbind(1)
    clips = [projected[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    logits = head(pad_sequence(clips))  # (T, K, C)
    return F.ctc_loss(
        F.log_softmax(logits.float(), dim=-1),
        ctc.characters,
        lengths,
        ctc.lengths,
        blank=CTC_BLANK,
        reduction="sum",
        zero_infinity=True,
    )
