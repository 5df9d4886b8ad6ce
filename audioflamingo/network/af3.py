"""Audio Flamingo 3: encoder, projector and language model joined (arXiv 2507.08128).

`AudioFlamingo3Model` encodes audio and writes it over the `<sound>` embeddings.
`AudioFlamingo3WithHead` adds the output layer and the loss. Files, tokenizers and sampling live elsewhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from audioflamingo.config import IGNORED_LABEL, AudioFlamingo3Config, GenerationConfig
from audioflamingo.errors import ArgumentError, PromptError, unknown_arguments
from audioflamingo.kernels.host import to_device, to_host
from audioflamingo.kernels.modules import Linear
from audioflamingo.network.adapters import Adapters, routed_to
from audioflamingo.network.attention import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from audioflamingo.network.encoder import AudioFlamingo3Attention, AudioFlamingo3Encoder
from audioflamingo.network.kv import KVCache, KVView
from audioflamingo.network.loss import causal_lm_loss, reference_padding_states
from audioflamingo.network.outputs import AudioFeaturesOutput, CausalLMOutput, LanguageModelOutput
from audioflamingo.network.projector import AudioFlamingo3MultiModalProjector
from audioflamingo.network.qwen2 import Qwen2Attention, Qwen2Model

CACHE_ROOM = 256  # slots beyond the prompt in a cache that nobody sized


class LanguageModelOptions(TypedDict, total=False):
    """What `AudioFlamingo3Model` hands on to `Qwen2Model.forward` as it is."""

    attention_mask: Tensor | None
    position_ids: Tensor | None
    output_hidden_states: bool
    output_attentions: bool


class AudioFlamingo3Model(nn.Module):
    """Encoder, projector and language model, without the output layer."""

    def __init__(self, config: AudioFlamingo3Config) -> None:
        super().__init__()
        self.config = config
        self.audio_tower = AudioFlamingo3Encoder(config.audio_config)
        self.multi_modal_projector = AudioFlamingo3MultiModalProjector(config)
        self.language_model = Qwen2Model(config.text_config)

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        *,
        window_index: Sequence[int] | None = None,
    ) -> AudioFeaturesOutput:
        """Encodes and projects audio windows.

        Args:
            input_features: `(W, M, T)` log-mel windows; cast to the weights' dtype.
            input_features_mask: `(W, T)`, 1 on valid frames.
            window_index: number of each window in its clip, which changes nothing unless the model hears the time.

        Returns:
            `last_hidden_state`: the encoder's output `(W, T // 4, D_audio)`, zeros past each window's audio tokens.
            `pooler_output`: the projected audio tokens of all windows in order, `(A, D_text)`.
        """
        encoded = self.audio_tower(input_features, input_features_mask)
        projected = self.project(encoded.audio_tokens, encoded.num_tokens, window_index)
        return AudioFeaturesOutput(encoded.last_hidden_state, projected)

    def project(
        self, audio_tokens: Tensor, num_tokens: Sequence[int], window_index: Sequence[int] | None = None
    ) -> Tensor:
        """From the encoder's rows to the language model's: what a model does with its audio after the encoder.

        Args:
            audio_tokens: of all windows in order, `(A, D_audio)`.
            num_tokens: rows of each window.
            window_index: as for `get_audio_features`.

        Returns:
            `(A, D_text)`.
        """
        return self.multi_modal_projector(audio_tokens)

    def hear(self, input_ids: Tensor | None, features: Tensor, mask: Tensor | None) -> AudioFeaturesOutput:
        """Encodes and projects the audio of prompts `(B, S)`."""
        return self.get_audio_features(features, mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        audio_embeds: Tensor | None = None,
        **options: Unpack[LanguageModelOptions],
    ) -> LanguageModelOutput:
        """Runs the model without its output layer; see `AudioFlamingo3WithHead.forward`.

        `audio_embeds` `(A, D)` are projected audio tokens (`get_audio_features(...).pooler_output`) in place of
        `input_features`. `options` are the language model's own: `attention_mask`, `position_ids`,
        `output_hidden_states`, `output_attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("give either input_ids or inputs_embeds, not both and not neither.")
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        if input_features is not None and audio_embeds is not None:
            raise ArgumentError("give either input_features or audio_embeds, not both.")
        if input_ids is None and not (input_features is None and audio_embeds is None):
            raise ArgumentError("audio needs input_ids, whose <sound> ids say where it goes.")
        if input_features is not None:
            audio_embeds = self.hear(input_ids, input_features, input_features_mask).pooler_output
        is_decode_step = past_key_values is not None and inputs_embeds.shape[1] == 1
        if input_ids is not None and not (
            is_decode_step and audio_embeds is None
        ):  # an answer may hold <sound>
            inputs_embeds = self._merge(input_ids, inputs_embeds, audio_embeds)
        if use_cache and past_key_values is None:
            text_config, (batch_size, num_columns, _) = self.config.text_config, inputs_embeds.shape
            context = text_config.max_position_embeddings
            past_key_values = KVCache(
                text_config.num_hidden_layers, batch_size, context, num_columns + CACHE_ROOM
            )
        output = self.language_model(inputs_embeds, past_key_values=past_key_values, **options)
        output.audio_hidden_states = audio_embeds
        return output

    def _merge(self, input_ids: Tensor, inputs_embeds: Tensor, audio_embeds: Tensor | None) -> Tensor:
        """Writes audio rows `(A, D)` over the `<sound>` positions of `(B, S, D)`, in order."""
        is_audio = input_ids == self.config.audio_token_id  # (B, S)
        num_slots = to_host(is_audio.sum())
        num_rows = 0 if audio_embeds is None else audio_embeds.shape[0]
        if num_slots != num_rows:
            raise PromptError(
                f"input_ids hold {num_slots} <sound> tokens, the audio gives {num_rows} vectors; both must come from "
                "one call of the processor."
            )
        if audio_embeds is None:
            return inputs_embeds
        audio_embeds = audio_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_audio[..., None].expand_as(inputs_embeds), audio_embeds)


class AudioFlamingo3WithHead(nn.Module):
    """Audio Flamingo 3 with its output layer and loss. `audioflamingo.model` adds loading and generation.

    Args:
        config: architecture; the weights start random (`from_pretrained` loads trained ones).

    Attributes:
        config_class: its configuration.
        network_class: what is below the output layer.
        accepts_loss_kwargs: of transformers' Trainer, whether it is to pass `num_items_in_batch`.
        adapters: what is loaded beside the weights.
        compiles_steps: whether an engine on a GPU captures decode steps, which takes seconds once and then saves more.
        kept_steps: what engines keep of them here.
    """

    config_class: ClassVar[type[AudioFlamingo3Config]] = AudioFlamingo3Config
    network_class: ClassVar[type[AudioFlamingo3Model]] = AudioFlamingo3Model
    # transformers' Trainer reads it: it then averages the losses of the batches of a step itself.
    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(self, config: AudioFlamingo3Config) -> None:
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig()
        self.adapters = Adapters()
        self.compiles_steps = False
        self.kept_steps: Any = None
        self.model = self.network_class(config)
        self.lm_head = Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        initialize_weights(self)

    @property
    def device(self) -> torch.device:
        """Device that inputs go to: that of the token embeddings."""
        return next(iter(self.get_input_embeddings().state_dict().values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; of a quantized model that of the parts that are not, and of activations."""
        return self.model.language_model.norm.weight.dtype

    def get_memory_footprint(self) -> int:
        """Bytes of the weights, shared ones counted once; quantized ones as they are stored. transformers' name."""
        tensors = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **unknown: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Runs the model over new tokens.

        Args:
            input_ids: `(B, S)`; each `<sound>` id takes one audio row, in order.
            input_features: `(W, M, T)` log-mel windows of all clips in the order of their `<sound>` ids.
            input_features_mask: `(W, T)`, 1 on valid frames.
            attention_mask: `(B, S)`, or `(B, past + S)` of which the last S columns count: 0 marks padding on any side.
            position_ids: `(B, S)`; by default real tokens are counted.
            past_key_values: cache of earlier tokens, appended to.
            inputs_embeds: `(B, S, D)` in place of `input_ids`.
            labels: `(B, S)` ids to predict at each position from those before it; -100 is ignored.
            use_cache: return a cache, a new one when none is given.
            logits_to_keep: n for the last n positions, 0 for all, or a 1-D tensor of positions. By default all; beside
                a loss they are then computed only when `output.logits` is read.
            output_hidden_states: also return the hidden states of every layer.
            output_attentions: also return the attention weights (`attn_implementation="eager"` only).
            return_dict: False for a plain tuple of the fields that are not None.
            num_items_in_batch: labels of all batches of an optimizer step, by which the sum of this batch's losses is
                then divided; by default the loss is the mean over this batch.
            **unknown: refused.

        Raises:
            ArgumentError: inputs that do not fit each other, or an unknown keyword.
            PromptError: as many `<sound>` ids as audio rows are needed, and there are not.
            ContextLengthError: more tokens than the model's context.
        """
        if unknown:
            allowed = inspect.signature(self.forward).parameters.keys() - {"unknown"}
            raise unknown_arguments("the model", unknown, allowed)
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden = outputs.last_hidden_state
        loss: Tensor | None = None
        logits: Any
        if labels is not None:
            predictors = hidden
            if attention_mask is not None and input_ids is not None:
                predictors = reference_padding_states(
                    self.model.language_model, hidden, input_ids, attention_mask, labels
                )
            loss = causal_lm_loss(predictors, labels, self.lm_head)
            if num_items_in_batch is not None:
                num_labels = (labels[:, 1:] != IGNORED_LABEL).sum().to(loss.device)
                loss = loss * num_labels / num_items_in_batch
        if labels is not None and logits_to_keep is None:
            logits = lambda: self.lm_head(hidden)  # noqa: E731
        else:
            logits = self.lm_head(_keep_positions(hidden, logits_to_keep))
        rest = {name: outputs[name] for name in outputs.keys() if name != "last_hidden_state"}  # noqa: SIM118
        output = CausalLMOutput(loss=loss, logits=logits, **rest)
        return output.to_tuple() if return_dict is False else output

    # What an engine calls, which batches rows of its own

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of tokens `(N,)`, `(N, D)`."""
        return self.get_input_embeddings()(token_ids)

    def packed_logits(self, x: Tensor, view: KVView, last: Tensor | None = None) -> Tensor:
        """Runs new tokens that are packed already, and tells where some of them may lead.

        Args:
            x: embeddings of the rows' new tokens, one row after the other, `(N, D)`.
            view: what the rows hold, and where the new tokens go; written. The caller counts the new tokens in.
            last: which of the tokens, `(R,)`; all by default.

        Returns:
            Logits of the token behind each, float32 `(R, V)`, on the device of `x`.
        """
        hidden = self.model.language_model.forward_packed(x, view)
        if last is None:
            return self.lm_head(hidden).float().to(x.device)
        with routed_to(last):
            return self.lm_head(hidden[last.to(hidden.device)]).float().to(x.device)

    def encode_in_pieces(
        self, features: Tensor, num_frames: int, num_positions: int, window_index: int = 0
    ) -> Generator[None, None, Tensor]:
        """Encodes and projects one window, the given one of its clip, little by little; see the encoder's own."""
        tower = self.model.audio_tower
        features = to_device(features, tower.conv1.weight.device)
        rows = yield from tower.in_pieces(features, num_frames, num_positions)
        return self.model.project(rows, [len(rows)], [window_index])

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        *,
        window_index: Sequence[int] | None = None,
    ) -> AudioFeaturesOutput:
        """Encodes and projects audio windows; see `AudioFlamingo3Model.get_audio_features`."""
        return self.model.get_audio_features(input_features, input_features_mask, window_index=window_index)

    def new_cache(
        self, batch_size: int, max_length: int | None = None, initial_length: int | None = None
    ) -> KVCache:
        """Builds an empty cache.

        Args:
            batch_size: rows.
            max_length: most tokens of a row, the model's context by default.
            initial_length: slots that are allocated at first, `max_length` by default; they double when they run out.
        """
        text_config = self.config.text_config
        limit = text_config.max_position_embeddings if max_length is None else max_length
        return KVCache(text_config.num_hidden_layers, batch_size, limit, initial_length)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Exists because peft's causal-language-model wrapper looks for it; `generate` has no use for it.

        Raises:
            ArgumentError: always, so that an adapter that depends on it (prompt tuning) does not fail in silence.
        """
        raise ArgumentError(
            "this model's generate does not call prepare_inputs_for_generation; use LoRA adapters."
        )

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embeddings."""
        return self.model.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output layer."""
        return self.lm_head

    def set_attn_implementation(self, implementation: AttentionImplementation) -> None:
        """Chooses `"sdpa"` (torch's fused kernels) or `"eager"` (the plain reference, which can return its weights)."""
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ArgumentError(
                f"attn_implementation {implementation!r} does not exist; choose from {ATTENTION_IMPLEMENTATIONS}."
            )
        for module in self.modules():
            if isinstance(module, Qwen2Attention | AudioFlamingo3Attention):
                module.implementation = implementation
        self.kept_steps = None  # recorded with another

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recomputes each layer in the backward pass, trading time for memory; in training mode only.

        Args:
            gradient_checkpointing_kwargs: as transformers' Trainer passes it; `{"use_reentrant": False}`, which is how
                it works, or None.
            every_n_layers: Trainer passes it too; every layer.
            offload: likewise; nothing is moved to the CPU.

        Raises:
            ArgumentError: another way is asked for.
        """
        if every_n_layers != 1 or offload:
            raise ArgumentError(
                f"every_n_layers={every_n_layers!r} and offload={offload!r} are not implemented: every layer is "
                "recomputed, nothing is moved; leave them out."
            )
        if gradient_checkpointing_kwargs and dict(gradient_checkpointing_kwargs) != {"use_reentrant": False}:
            raise ArgumentError(
                "gradient_checkpointing_kwargs may be None or {'use_reentrant': False}, got "
                f"{gradient_checkpointing_kwargs!r}."
            )
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps the activations of every layer again."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        self.model.audio_tower.gradient_checkpointing = enabled
        self.model.language_model.gradient_checkpointing = enabled


def _keep_positions(hidden: Tensor, logits_to_keep: int | Tensor | None) -> Tensor:
    """The positions of `(B, S, D)` whose logits are wanted."""
    if logits_to_keep is None:
        return hidden
    if isinstance(logits_to_keep, Tensor):
        return hidden[:, logits_to_keep]
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ArgumentError(
            f"logits_to_keep must be 0 (all), a count or a tensor of positions, got {logits_to_keep!r}."
        )
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden


@torch.no_grad()
def initialize_weights(model: AudioFlamingo3WithHead) -> None:
    """Fills a freshly built model: normal weights, zero biases, Whisper's sinusoidal positions.

    Nothing happens on the meta device, where weights are about to be loaded.
    """
    encoder = model.model.audio_tower
    if encoder.embed_positions.weight.is_meta:
        return
    encoder_modules = set(encoder.modules())
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            part = model.config.audio_config if module in encoder_modules else model.config.text_config
            nn.init.normal_(module.weight, std=part.initializer_range)
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)
    encoder.embed_positions.weight.copy_(sinusoidal_positions(*encoder.embed_positions.weight.shape))


def sinusoidal_positions(num_positions: int, width: int) -> Tensor:
    """Whisper's position table `(num_positions, width)`: sines, then cosines, of geometrically spaced frequencies."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / max(half - 1, 1) * torch.arange(half))
    angles = torch.arange(num_positions)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
