"""Where the documents of a batch begin and end, worked out once a forward and read by every component.

Legend: B rows, T tokens, N documents in the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Documents:
    """The documents in a batch of packed or padded rows.

    `positions` `[B, T]`: position of a token in its text (rotary positions, the embedding's length rule).
    `offset` `[B, T]`: tokens of the same document before this one (what a tap or a block may reach back to).
    `number` `[B, T]`: which document of the batch a token belongs to, counted over all rows from 0.
    `first_token` `[N]`: index of each document's first token in the flattened `[B * T]` batch.
    `lengths` `[N]`: each document's tokens in this batch.
    `carried` `[B]`: tokens of a row's first document that went before, in the cache; None without a cache.
    """

    positions: torch.Tensor
    offset: torch.Tensor
    number: torch.Tensor
    first_token: torch.Tensor
    lengths: torch.Tensor
    carried: torch.Tensor | None = None

    def to(self, *arguments, **options) -> Documents:
        """The same on another device; takes what `Tensor.to` takes. accelerate calls it for layers on several devices."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value.to(*arguments, **options) for name, value in tensors.items()})

    @classmethod
    def from_positions(cls, positions: torch.Tensor, past: int | None = None) -> Documents:
        """A document begins wherever a position is 0, and at the beginning of every row.

        With a cache of `past` tokens, a row whose first position is not 0 goes on with the document in the cache.
        """
        batch, tokens = positions.shape
        if tokens == 1 and past is not None:  # decoding
            rows = torch.arange(batch, device=positions.device)
            carried = positions[:, 0].clamp(max=past)
            return cls(positions, carried.unsqueeze(1), rows.unsqueeze(1), rows, torch.ones_like(rows), carried)
        index = torch.arange(tokens, device=positions.device).expand(batch, tokens)
        begins = positions == 0
        begins[:, 0] = True
        first_in_row = torch.where(begins, index, 0).cummax(dim=1).values
        offset = index - first_in_row
        carried = None
        if past is not None:
            carried = positions[:, 0].clamp(max=past)
            offset = offset + torch.where(first_in_row == 0, carried.unsqueeze(1), 0)
        number = begins.flatten().cumsum(0).sub(1).view(batch, tokens)
        first_token = begins.flatten().nonzero().squeeze(1)
        lengths = torch.diff(first_token, append=first_token.new_tensor([batch * tokens]))
        return cls(positions, offset, number, first_token, lengths, carried)


def positions_from_mask(attention_mask: torch.Tensor, position_ids: torch.Tensor | None, past: int = 0) -> torch.Tensor:
    """Give every run of padding positions of its own from 0, so that it is a document of its own.

    `attention_mask` `[B, past + T]` is 1 on text and 0 on padding; `position_ids` `[B, T]` (or None) are the text's
    positions. Used for left- and right-padded batches alike: padding then neither sees the text nor is seen by it.
    Raises `ValueError` for `position_ids` that do not begin at 0 behind padding.
    """
    text = attention_mask.bool()
    if position_ids is None:
        position_ids = (text.cumsum(1) - 1).clamp(min=0)[:, past:]
    behind_padding = (text & ~F.pad(text[:, :-1], (1, 0), value=True))[:, past:]
    if bool((behind_padding & (position_ids != 0)).any()):
        raise ValueError("position_ids count padding as well; let them begin at 0 with each text, or leave them out")
    text = text[:, past:]
    index = torch.arange(text.shape[1], device=text.device).expand_as(text)
    before = F.pad(text[:, :-1], (1, 0), value=True)
    first_of_run = torch.where(~text & before, index, 0).cummax(dim=1).values
    return torch.where(text, position_ids, index - first_of_run)


def order_without_gaps(attention_mask: torch.Tensor, past: int = 0) -> torch.Tensor | None:
    """The order `[B, T]` in which each row's padding comes before its text; None if no text has padding inside.

    PEFT's prompt tuning makes such texts: it puts its virtual tokens in front of a batch that is padded on the left.
    `attention_mask` is `[B, past + T]`. Raises `ValueError` if a text in the cache goes on behind padding, as when
    generating behind a prompt that is padded on the right: the cache then ends with the padding.
    """
    text = attention_mask.bool()
    resumes = text[:, 1:] & ~text[:, :-1] & (text.cumsum(1)[:, :-1] > 0)
    if not bool(resumes[:, max(past - 1, 0) :].any()):
        return None
    if past:
        raise ValueError('a text in the cache goes on behind padding; pad prompts with padding_side="left"')
    return text.int().argsort(dim=1, stable=True)


def positions_from_packing(
    shape: tuple[int, int], seq_idx: torch.Tensor | None, cu_seq_lens: torch.Tensor | None
) -> torch.Tensor:
    """Positions `[B, T]` of packed rows, told as transformers' collators tell them to Mamba's and flash attention's kernels.

    `seq_idx` `[B, T]`: a number for each document. `cu_seq_lens` `[N + 1]`: where documents begin in the flattened batch,
    and where the last ends. Raises `ValueError` if they are of another shape.
    """
    if seq_idx is not None:
        if seq_idx.shape != shape:
            raise ValueError(f"seq_idx has the shape {tuple(seq_idx.shape)}; it must be {shape}, as the tokens")
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    else:
        tokens = shape[0] * shape[1]
        if cu_seq_lens[0] != 0 or cu_seq_lens[-1] != tokens:
            raise ValueError(
                f"cu_seq_lens_q reaches from {int(cu_seq_lens[0])} to {int(cu_seq_lens[-1])}; it must begin with 0 and end "
                f"with the batch's {tokens} tokens"
            )
        begins = torch.zeros(tokens, dtype=torch.bool, device=cu_seq_lens.device)
        begins[cu_seq_lens[:-1].long()] = True
        begins = begins.view(shape)
        begins[:, 0] = True
    index = torch.arange(shape[1], device=begins.device).expand(shape)
    return index - torch.where(begins, index, 0).cummax(dim=1).values
