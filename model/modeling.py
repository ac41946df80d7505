"""`LiquidModel` and `LiquidForCausalLM`: the blocks assembled into Hugging Face models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from model.attention import LocalAttention, RotaryPositions, local_mask
from model.block import LiquidBlock
from model.cache import check_cache
from model.configuration import LiquidConfig
from model.documents import Documents, order_without_gaps, positions_from_mask, positions_from_packing
from model.embedding import LiquidEmbedding
from model.loss import LossWeights, RunningMeans, check_labels, language_loss_sums, regularisation_sums, total_loss
from model.metrics import routing_statistics
from model.moe import Experts, Router, balancing_bias
from model.projection import ResidualProjection, TapProjection

# Lower than any token's logit, yet high enough in fp16 for means and entropies over the logits to stay finite.
UNUSED_LOGIT = -1e4
# Initial standard deviation of the embedding's taps: they have almost no effect at first.
CONVOLUTION_DEVIATION = 0.02
# transformers wants a default for each field of an output, also for those that are always set.
ALWAYS_SET: Any = None


@dataclass
class LiquidModelOutput(ModelOutput):
    """The output of `LiquidModel`.

    `last_hidden_state` `[B, T, D]`, `router_logits` `[L, B, T, E]`, and the embedding's `reconstruction_error` and
    `retained_ratio`, both `[B, T]`. On request also `hidden_states` (L + 1 of `[B, T, D]`) and `attentions` (L of
    `[B, H, T, keys]`).
    """

    last_hidden_state: torch.Tensor = ALWAYS_SET
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: torch.Tensor = ALWAYS_SET
    reconstruction_error: torch.Tensor = ALWAYS_SET
    retained_ratio: torch.Tensor = ALWAYS_SET


@dataclass
class LiquidCausalLMOutput(ModelOutput):
    """The output of `LiquidForCausalLM`.

    `loss`: a mean over this batch. In training it is that of the weighted sum of all terms, otherwise that of the cross
    entropy alone.
    `loss_sums`: an fp32 sum over tokens for each term of `model.loss`. `statistics`: from
    `model.metrics.routing_statistics`. A trainer that accumulates several batches uses these two instead of `loss`.
    `logits` `[B, T, V]`: left out in training with labels, because nothing reads them there. `hidden_states` and
    `attentions`: as in `LiquidModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    loss_sums: dict[str, torch.Tensor] | None = None
    statistics: dict[str, torch.Tensor] | None = None


class LiquidPreTrainedModel(PreTrainedModel):
    """The initialisation and the declarations that transformers reads."""

    config: LiquidConfig
    config_class = LiquidConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LiquidBlock", "LiquidEmbedding"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": LiquidBlock, "attentions": LocalAttention}
    # A recurrent state cannot be rolled back. This flag makes transformers refuse assisted decoding.
    _is_stateful = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return True: model/moe.py supports it, but transformers would search only this file's text for it."""
        return True

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the table as in every transformers model, and set `used_vocab_size` to `new_num_tokens`, before padding.

        Raises `ValueError` if a special id of the configuration would not fit.
        """
        if new_num_tokens is not None:
            self.config.sized_for(new_num_tokens)
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            self.config.used_vocab_size = new_num_tokens
        return table

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualProjection):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            # Unit-size inputs then give unit-size outputs (LeCun et al. 1998), to match the unit-size residual stream.
            # The head's weight is also set here, but the tied table replaces it afterwards.
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            # The table is also the head, a linear layer. Adam's first steps would randomise smaller rows.
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        if isinstance(module, LiquidEmbedding):
            init.normal_(module.convolution, std=CONVOLUTION_DEVIATION)
            init.zeros_(module.rule)  # a = b = ln 2: with r_min = ¼ the initial ratio is between 0.63 and 0.85
            # Two independent rotations. If the second were the inverse of the first, the tied head would at first predict
            # that each token repeats, and training would have to unlearn that.
            init.orthogonal_(module.compress)
            init.orthogonal_(module.expand)
        elif isinstance(module, TapProjection):
            init.zeros_(module.weight)  # all tokens start with the same taps (Dai et al. 2017)
            init.copy_(module.bias, module.initial_bias())
        elif isinstance(module, Router):
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.hidden_size**-0.5)
            init.zeros_(module.down_proj)  # like a ResidualProjection
        elif isinstance(module, nn.LSTM):
            for name, bias in module.named_parameters():
                if name.startswith("bias_ih"):  # open the forget gate at first (Jozefowicz et al. 2015)
                    forget = torch.zeros_like(bias)
                    forget[module.hidden_size : 2 * module.hidden_size] = 1.0
                    init.copy_(bias, forget)


class LiquidModel(LiquidPreTrainedModel):
    """Map token ids to hidden states, causally and independently for each document."""

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.liquid_embedding = LiquidEmbedding(config)
        self.rotary = RotaryPositions(config)
        self.layers = nn.ModuleList(LiquidBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> LiquidModelOutput:
        """Run the model: `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]` → `LiquidModelOutput`.

        - Packed rows are described by `position_ids` `[B, T]` that restart at 0, or by `seq_idx` or `cu_seq_lens_q` as
          transformers' collators make them.
        - Padded batches are described by `attention_mask` `[B, P + T]`, with P tokens in the cache.
        - With `use_cache`, the returned `past_key_values` continue each row's last document. The default is the
          configuration's value, but False in training.
        - `output_hidden_states`, `output_attentions` and `return_dict` work as in every transformers model. Other unknown
          options are ignored.

        Raises `ValueError`

        - if both or neither of ids and embeddings are given
        - if the mask has the wrong shape
        - if `position_ids` contradict the packing, or the packing is given together with cached tokens
        - if the cache was not made for this model, or is used under gradient checkpointing
        - if attention weights are requested and `attn_implementation` is not `eager`
        - if attention weights or hidden states are requested for texts with padding inside
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both")
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions needs eager attention; call model.set_attn_implementation("eager")')
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            check_cache(past_key_values, self.config.sliding_window, embedded.shape[1])
            if self.training and self.layers[0].gradient_checkpointing:
                raise ValueError("gradient checkpointing cannot fill a cache; call eval() or pass use_cache=False")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = _told_by_packing(position_ids, embedded, past, kwargs)
        _check_mask(attention_mask, embedded, past)
        order = None
        if attention_mask is not None and (order := order_without_gaps(attention_mask, past)) is not None:
            if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
                raise ValueError(
                    "hidden states and attentions are not available for texts with padding inside; move the padding to one "
                    "side, or do not request them"
                )
            attention_mask = attention_mask.gather(1, order)
            embedded = _in_order(embedded, order)
            position_ids = position_ids if position_ids is None else position_ids.expand_as(order).gather(1, order)
        documents = self._documents(embedded, attention_mask, position_ids, past_key_values, past)

        hidden, reconstruction_error, retained_ratio = self.liquid_embedding(embedded, documents, past_key_values)
        rotation = self.rotary(documents.positions, hidden.dtype)
        mask = local_mask(self.config, hidden, documents, past_key_values)
        router_logits = []
        for layer in self.layers:
            hidden, logits = layer(hidden, rotation, documents, mask, past_key_values=past_key_values)
            router_logits.append(logits)
        results = {
            "last_hidden_state": self.norm(hidden),
            "router_logits": torch.stack([logits.to(hidden.device) for logits in router_logits]),
            "reconstruction_error": reconstruction_error,
            "retained_ratio": retained_ratio,
        }
        if order is not None:
            back = order.argsort(dim=1)
            results = {name: _in_order(values, back) for name, values in results.items()}
        return LiquidModelOutput(past_key_values=past_key_values, **results)

    @staticmethod
    def _documents(
        embedded: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        past: int,
    ) -> Documents:
        batch, tokens = embedded.shape[:2]
        if attention_mask is not None:
            position_ids = positions_from_mask(attention_mask, position_ids, past)
        elif position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=embedded.device)
        return Documents.from_positions(position_ids.expand(batch, tokens), past=None if cache is None else past)


def _check_mask(attention_mask: torch.Tensor | None, embedded: torch.Tensor, past: int) -> None:
    batch, tokens = embedded.shape[:2]
    if attention_mask is not None and attention_mask.shape != (batch, past + tokens):
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; it must be {(batch, past + tokens)}: one "
            "row per text, with 1 or 0 for each token in the cache and in this call"
        )


def _told_by_packing(
    position_ids: torch.Tensor | None, embedded: torch.Tensor, past: int, options: dict
) -> torch.Tensor | None:
    """Return `position_ids`, or positions computed from `seq_idx` or `cu_seq_lens_q` if only those are given."""
    seq_idx, cu_seq_lens = options.get("seq_idx"), options.get("cu_seq_lens_q")
    if seq_idx is None and cu_seq_lens is None:
        return position_ids
    if past:
        raise ValueError("seq_idx and cu_seq_lens_q cannot be combined with cached tokens; give position_ids instead")
    told = positions_from_packing((embedded.shape[0], embedded.shape[1]), seq_idx, cu_seq_lens)
    # Ignore each row's first token: it may continue a document that began in an earlier row.
    if position_ids is not None and bool(((told == 0) != (position_ids.expand_as(told) == 0))[:, 1:].any()):
        raise ValueError(
            "position_ids do not restart at 0 where seq_idx or cu_seq_lens_q begin a document; give only one of them"
        )
    return told if position_ids is None else position_ids


def _in_order(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Put the tokens of `[B, T]`, `[B, T, D]` or `[L, B, T, E]` into the order `[B, T]`."""
    index = order.unsqueeze(-1) if values.dim() > 2 else order
    return values.gather(-2 if values.dim() > 2 else 1, index.expand(values.shape))


class LiquidForCausalLM(LiquidPreTrainedModel, GenerationMixin):
    """The language model: `LiquidModel` and a head tied to its token table."""

    if TYPE_CHECKING:  # transformers declares it in a way that only another type checker reads
        generate: Any
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LiquidConfig):
        super().__init__(config)
        self.model = LiquidModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_weights = LossWeights()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        running_means: RunningMeans | None = None,
        **kwargs: Any,
    ) -> LiquidCausalLMOutput:
        """Compute the logits and, given `labels` (aligned with the inputs, -100 = not predicted), the loss and its terms.

        In training the loss is the weighted sum of all terms. In `eval()` it is the cross entropy alone, as in
        transformers' own models, so its exponential is the perplexity. Padding on either side of a text neither predicts
        nor is predicted.

        `num_items_in_batch`: the number of labels in all micro-batches of a step, as transformers' trainers count them.
        The loss is then scaled by this micro-batch's share, so that the sum over micro-batches is a mean.
        `running_means`: the means around which the usage and budget terms are expanded; without them, these terms have no
        gradient.

        Raises `ValueError` for labels that are neither -100 nor token ids.
        """
        if labels is not None:
            check_labels(labels, self.config.token_count)
            text = self._text(input_ids, attention_mask, labels)
            labels = _without_padding(labels, text)
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        loss = logits = sums = statistics = None
        if labels is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._predict(output.last_hidden_state[:, keep])
        if labels is not None:
            sums, statistics = self._loss_sums(output, labels, text, running_means)
            supervised = (labels[:, 1:] != -100).sum()
            loss = sums["cross_entropy"] / supervised.clamp(min=1)
            if self.training:
                loss = total_loss(sums, self.loss_weights, supervised.clamp(min=1), text.sum().clamp(min=1))
            if num_items_in_batch is not None:
                items = torch.as_tensor(num_items_in_batch, device=supervised.device)
                loss = loss * (supervised / items.clamp(min=1))
        if logits is not None:
            unused = self.config.vocab_size - self.config.token_count
            logits = nn.functional.pad(logits, (0, unused), value=UNUSED_LOGIT)
        return LiquidCausalLMOutput(
            loss, logits, output.past_key_values, output.hidden_states, output.attentions, sums, statistics
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Return the mask `[B, P + T]` unchanged: the model derives the attention mask itself, even for a static cache."""
        return attention_mask

    def _predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the logits of the ids that the tokenizer knows."""
        return self.lm_head(hidden)[..., : self.config.token_count]

    def _loss_sums(
        self, output: LiquidModelOutput, labels: torch.Tensor, text: torch.Tensor, means: RunningMeans | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        config = self.config
        means = means or RunningMeans.initial(
            config.num_hidden_layers, config.num_experts, config.embedding_target_ratio
        )
        language = language_loss_sums(output.last_hidden_state, labels, self._predict, self.loss_weights.focal_gamma)
        regularisation = regularisation_sums(
            output.router_logits,
            output.reconstruction_error,
            output.retained_ratio,
            text,
            means,
            config.embedding_target_ratio,
        )
        statistics = routing_statistics(
            output.router_logits, output.retained_ratio, text, config.num_experts_per_tok, balancing_bias(self)
        )
        return language | regularisation, statistics

    def _text(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return which tokens are not padding, bool `[B, T]`; statistics and regularisation exclude padding."""
        if attention_mask is not None:
            return attention_mask[:, -labels.shape[1] :].bool()
        if input_ids is None or self.config.pad_token_id is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return input_ids != self.config.pad_token_id


def _without_padding(labels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Mask the labels `[B, T]` of padding, and of each token that directly follows padding."""
    predicted = text.clone()
    predicted[:, 1:] &= text[:, :-1]
    return labels.masked_fill(~predicted, -100)
