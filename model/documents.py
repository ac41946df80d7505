"""Where the documents of a batch begin and end, computed once per forward pass and read by every component.

Legend: B rows, T tokens, N documents in the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Documents:
    """The documents in a batch of packed or padded rows.

    `positions` `[B, T]`: a token's position in its text, for the rotary positions and the embedding's length rule.
    `offset` `[B, T]`: how many tokens of the same document precede this one, the furthest that a tap may reach back.
    `number` `[B, T]`: index of the token's document, counted from 0 over all rows of the batch.
    `first_token` `[N]`: index of each document's first token in the flattened `[B * T]` batch.
    `lengths` `[N]`: each document's number of tokens in this batch.
    `carried` `[B]`: how many tokens of a row's first document are in the cache; None without a cache.
    """

    positions: torch.Tensor
    offset: torch.Tensor
    number: torch.Tensor
    first_token: torch.Tensor
    lengths: torch.Tensor
    carried: torch.Tensor | None = None

    @property
    def continued(self) -> torch.Tensor:
        """`carried` of a batch that has a cache."""
        if self.carried is None:
            raise ValueError("these documents were found without a cache")
        return self.carried

    def to(self, *arguments: Any, **options: Any) -> Documents:
        """Copy to another device, with the arguments of `Tensor.to`. accelerate calls it for layers on several devices."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value.to(*arguments, **options) for name, value in tensors.items()})

    @classmethod
    def from_positions(cls, positions: torch.Tensor, past: int | None = None) -> Documents:
        """Find the documents: one begins at every position 0 and at the beginning of every row.

        With a cache of `past` tokens, a row whose first position is not 0 continues the document in the cache.
        """
        batch, tokens = positions.shape
        if tokens == 1 and past is not None:  # decoding
            rows = torch.arange(batch, device=positions.device)
            known = positions[:, 0].clamp(max=past)
            return cls(positions, known.unsqueeze(1), rows.unsqueeze(1), rows, torch.ones_like(rows), known)
        index = torch.arange(tokens, device=positions.device).expand(batch, tokens)
        begins = positions == 0
        begins[:, 0] = True
        first_in_row = torch.where(begins, index, 0).cummax(dim=1).values
        offset = index - first_in_row
        carried: torch.Tensor | None = None
        if past is not None:
            carried = positions[:, 0].clamp(max=past)
            offset = offset + torch.where(first_in_row == 0, carried.unsqueeze(1), 0)
        number = begins.flatten().cumsum(0).sub(1).view(batch, tokens)
        first_token = begins.flatten().nonzero().squeeze(1)
        lengths = torch.diff(first_token, append=first_token.new_tensor([batch * tokens]))
        return cls(positions, offset, number, first_token, lengths, carried)


def positions_from_mask(attention_mask: torch.Tensor, position_ids: torch.Tensor | None, past: int = 0) -> torch.Tensor:
    """Number the positions of every run of padding from 0, so that it becomes a document of its own.

    Padding then neither sees the text nor is seen by it, on either side. `attention_mask` `[B, past + T]` is 1 for text
    and 0 for padding; `position_ids` `[B, T]` (or None) are the text's positions. Raises `ValueError` if the
    `position_ids` of a text after padding do not begin at 0.
    """
    text = attention_mask.bool()
    if position_ids is None:
        position_ids = (text.cumsum(1) - 1).clamp(min=0)[:, past:]
    behind_padding = (text & ~F.pad(text[:, :-1], (1, 0), value=True))[:, past:]
    if bool((behind_padding & (position_ids != 0)).any()):
        raise ValueError("position_ids also count padding; make them begin at 0 with each text, or leave them out")
    text = text[:, past:]
    index = torch.arange(text.shape[1], device=text.device).expand_as(text)
    before = F.pad(text[:, :-1], (1, 0), value=True)
    first_of_run = torch.where(~text & before, index, 0).cummax(dim=1).values
    return torch.where(text, position_ids, index - first_of_run)


def order_without_gaps(attention_mask: torch.Tensor, past: int = 0) -> torch.Tensor | None:
    """Find the order `[B, T]` that puts each row's padding before its text; None if no text has padding inside.

    PEFT's prompt tuning produces padding inside a text: it prepends virtual tokens to a left-padded batch.
    `attention_mask` is `[B, past + T]`. Raises `ValueError` if a text in the cache continues after padding. This happens
    when generating from a right-padded prompt, because the cache then ends with padding.
    """
    text = attention_mask.bool()
    resumes = text[:, 1:] & ~text[:, :-1] & (text.cumsum(1)[:, :-1] > 0)
    if not bool(resumes[:, max(past - 1, 0) :].any()):
        return None
    if past:
        raise ValueError('a text in the cache continues after padding; pad prompts with padding_side="left"')
    return text.int().argsort(dim=1, stable=True)


def positions_from_packing(
    shape: tuple[int, int], seq_idx: torch.Tensor | None, cu_seq_lens: torch.Tensor | None
) -> torch.Tensor:
    """Compute the positions `[B, T]` of packed rows from what transformers' collators pass to specialised kernels.

    `seq_idx` `[B, T]` (for Mamba): the number of each token's document. `cu_seq_lens` `[N + 1]` (for flash attention):
    where documents begin in the flattened batch, and where the last one ends. Raises `ValueError` if their shapes do not
    fit the batch.
    """
    if seq_idx is not None:
        if seq_idx.shape != shape:
            raise ValueError(f"seq_idx has the shape {tuple(seq_idx.shape)}; it must be {shape}, like the tokens")
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    elif cu_seq_lens is None:
        raise ValueError("give seq_idx or cu_seq_lens_q")
    else:
        tokens = shape[0] * shape[1]
        if cu_seq_lens[0] != 0 or cu_seq_lens[-1] != tokens:
            raise ValueError(
                f"cu_seq_lens_q ranges from {int(cu_seq_lens[0])} to {int(cu_seq_lens[-1])}; it must begin with 0 and end "
                f"with the batch's {tokens} tokens"
            )
        begins = torch.zeros(tokens, dtype=torch.bool, device=cu_seq_lens.device)
        begins[cu_seq_lens[:-1].long()] = True
        begins = begins.view(shape)
        begins[:, 0] = True
    index = torch.arange(shape[1], device=begins.device).expand(shape)
    return index - torch.where(begins, index, 0).cummax(dim=1).values
