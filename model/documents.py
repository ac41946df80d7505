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
    Raises `ValueError` for padding inside a text (as generating behind a prompt that is padded on the right makes it),
    and for `position_ids` that do not begin at 0 behind padding.
    """
    text = attention_mask.bool()
    if bool((text[:, :-1] & ~text[:, 1:]).cumsum(1)[:, :-1].logical_and(text[:, 2:]).any()):
        fix = 'pad prompts with padding_side="left"' if past else "pack texts with position_ids that restart at 0"
        raise ValueError(f"attention_mask has padding inside a text; {fix}")
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
