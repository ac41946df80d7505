"""The liquid embedding: a token table, causal convolutions and an adaptive bottleneck.

With table rows e_t at unit size (rms), convolved x_t, R ordered components and a document's tokens t = 0, 1, …:

    x_t  = e_t + silu(W_g e_t) * Σ_j K_j * e_{t-j}          (depthwise; taps never leave the document)
    n_t  = 1 - cos(e_t, mean(e_0 … e_{t-1})), n_0 = 1        (novelty: scale-free, detached)
    c_t  = mean(n_0 … n_t)                                   (complexity of the document so far)
    ρ_t  = r_min + (1 - r_min) σ(a log1p(t) / log(max) + b c_t + d),   a, b > 0
    m_tr = σ((R ρ_t - r) / τ),  r = ½, 1½, …, R - ½          (soft mask over the ordered components)
    y_t  = U (m_t * V x_t)

Short or simple beginnings keep few components; long or complex texts keep more. The reconstruction error
‖rms(y_t) - e_t‖² / D = 2 - 2 cos(y_t, e_t), against the detached table row, keeps the bottleneck faithful.

Rows are scaled to unit size so that tokens stay distinguishable early in training. Table rows are initialised at rms
1/√D, while the layers' first steps write a direction common to all tokens (the unigram's), of rms 1 or more, over them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from model.cache import EMBEDDING, with_past
from model.configuration import LiquidConfig
from model.documents import Documents


class LiquidEmbedding(nn.Module):
    """Compress token embeddings `[B, T, D]` by the equations above."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.config = config
        self.convolution = nn.Parameter(torch.empty(config.embedding_kernel_size, config.hidden_size))
        self.gate = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.compress = nn.Parameter(torch.empty(config.embedding_components, config.hidden_size))
        self.expand = nn.Parameter(torch.empty(config.hidden_size, config.embedding_components))
        # a, b and d of the rule for ρ; a softplus keeps a and b positive
        self.rule = nn.Parameter(torch.empty(3))

    def forward(
        self, embedded: torch.Tensor, documents: Documents, past_key_values: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the compressed embeddings `[B, T, D]`, the reconstruction error and the ratio ρ, both fp32 `[B, T]`."""
        embedded = F.rms_norm(embedded, embedded.shape[-1:], eps=self.config.rms_norm_eps)
        convolved = self._convolve(embedded, documents, past_key_values)
        mixed = embedded + F.silu(self.gate(embedded)) * convolved
        ratio = self._retained_ratio(embedded.detach().float(), documents, past_key_values)
        components = self.config.embedding_components
        order = torch.arange(components, device=embedded.device) + 0.5
        mask = torch.sigmoid((components * ratio.unsqueeze(-1) - order) / self.config.embedding_temperature)
        output = F.linear(F.linear(mixed, self.compress) * mask.to(mixed.dtype), self.expand)
        error = 2 * (1 - cosine(output.float(), embedded.detach().float()))
        return output, error, ratio

    def _convolve(self, embedded: torch.Tensor, documents: Documents, cache: Cache | None) -> torch.Tensor:
        tokens, past = embedded.shape[1], self.config.embedding_kernel_size - 1
        zeros = F.pad(embedded, (0, 0, past, 0))
        reached = zeros if cache is None else with_past(cache, embedded, 0, EMBEDDING, past)
        total = embedded * self.convolution[0]
        for tap in range(1, past + 1):
            inside = (documents.offset >= tap).unsqueeze(-1)
            earlier = reached[:, past - tap : past - tap + tokens]
            total = total + torch.where(inside, earlier, 0.0) * self.convolution[tap]
        return total

    def _retained_ratio(self, embedded: torch.Tensor, documents: Documents, cache: Cache | None) -> torch.Tensor:
        with torch.no_grad():
            known = None if cache is None else cache.get_recurrent_state(0, EMBEDDING)
            sums = (None, None) if known is None else known.split((embedded.shape[-1], 1), dim=-1)
            # Use fp64, because a document's sum is a difference of row sums: in fp32, rounding would make a token's
            # novelty depend on the other documents in its row.
            wide = embedded.double()
            total = sum_in_document(wide, documents, sums[0])
            # The sum of the earlier tokens stands in for their mean: the cosine depends on the direction only.
            novelty = torch.where(documents.offset == 0, 1.0, 1 - cosine(wide, total - wide))
            complexity = sum_in_document(novelty.unsqueeze(-1), documents, sums[1])
            if cache is not None:
                newest = torch.cat((total[:, -1], complexity[:, -1]), dim=-1)
                cache.update_recurrent_state(newest, 0, state_idx=EMBEDDING)
            complexity = complexity.squeeze(-1).float() / (documents.offset + 1)
            length = torch.log1p(documents.positions.float()) / math.log(self.config.max_position_embeddings)
        rule = self.rule.float()
        a, b = F.softplus(rule[0]), F.softplus(rule[1])
        minimum = self.config.embedding_minimum_ratio
        return minimum + (1 - minimum) * torch.sigmoid(a * length + b * complexity + rule[2])


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compute the cosine of `[B, T, D]` vectors, `[B, T]`; 0 if either vector is zero.

    It takes three reductions; torch's own function divides whole vectors.
    """
    lengths = torch.linalg.vector_norm(first, dim=-1) * torch.linalg.vector_norm(second, dim=-1)
    return torch.einsum("btd,btd->bt", first, second) / lengths.clamp(min=torch.finfo(first.dtype).eps)


def sum_in_document(values: torch.Tensor, documents: Documents, known: torch.Tensor | None = None) -> torch.Tensor:
    """Compute running sums of `[B, T, D]` values within each document, including the token itself.

    `known` `[B, D]`: the sums over the tokens in the cache, for documents that continue from it.
    """
    if values.shape[1] == 1:  # decoding
        return (
            values if known is None else values + torch.where((documents.continued > 0)[:, None], known, 0.0)[:, None]
        )
    total = values.cumsum(dim=1)
    before = total.flatten(0, 1)[documents.first_token] - values.flatten(0, 1)[documents.first_token]  # [N, D]
    if known is not None:
        first = documents.number[:, 0]
        goes_on = (documents.continued > 0).unsqueeze(1)
        before = before.index_add(0, first, torch.where(goes_on, -known, 0.0))
    return total - before[documents.number]
