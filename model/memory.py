"""LSTM memory (Hochreiter & Schmidhuber 1997): a slow recurrent state that complements the local attention.

The LSTM advances once per block of S tokens, on the block's mean. Token t of a document reads, through a gate, the state
after the block before its own (zero in the first block). So nothing from its own block or the future leaks in:

    s_j = LSTM(mean(x_{jS} … x_{jS+S-1})),   out_t = σ(W_g x_t) * W_o s_{⌊t/S⌋-1}

A single call of `nn.LSTM` processes the blocks of all documents.

Legend: B rows, T tokens, N documents, n completed blocks of all documents, M LSTM layers of size H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import Cache

from model.cache import MEMORY
from model.configuration import LiquidConfig
from model.documents import Documents
from model.projection import ResidualProjection


@dataclass(frozen=True)
class MemoryState:
    """The state carried from one call to the next: h and c `[M, N, H]`, and the unfinished block's sum `[N, D]`.

    Each document of the batch has an entry, which is zero if the document begins in this batch.
    """

    hidden: torch.Tensor
    cell: torch.Tensor
    partial: torch.Tensor


class LSTMMemory(nn.Module):
    """Read each token's document memory: `[B, T, D]` → `[B, T, D]`."""

    def __init__(self, config: LiquidConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.stride = config.memory_stride
        self.lstm = OrderedLSTM(
            config.hidden_size, config.memory_hidden_size, num_layers=config.memory_num_layers, batch_first=True
        )
        self.gate = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = ResidualProjection(config.memory_hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, documents: Documents, past_key_values: Cache | None = None) -> torch.Tensor:
        if past_key_values is not None and hidden.shape[1] == 1:
            return self._decode(hidden, documents, past_key_values)
        blocks = Blocks.of(documents, self.stride)
        before = None if past_key_values is None else self._recall(past_key_values, hidden, documents)
        states, after = self._run(self._means(hidden, blocks, before), blocks, before)
        if past_key_values is not None and before is not None:
            self._remember(past_key_values, hidden, documents, blocks, before, after)
        # Project the states before spreading them over tokens, because there are fewer states than tokens. The rows after
        # the blocks' states serve tokens whose previous block was not completed in this call.
        entered = states.new_zeros(1, states.shape[1]) if before is None else before.hidden[-1]
        read = self.out_proj(torch.cat((states, entered)))
        return torch.sigmoid(self.gate(hidden)) * read[blocks.read_by(documents, per_document=before is not None)]

    def _decode(self, hidden: torch.Tensor, documents: Documents, cache: Cache) -> torch.Tensor:
        """Decode one token per row, `[B, 1, D]`: it reads the current state and may complete its block."""
        before = self._recall(cache, hidden, documents)
        partial, states = before.partial + hidden[:, 0], torch.stack((before.hidden, before.cell))
        completes = documents.continued % self.stride == self.stride - 1
        # If the LSTM has hooks, always run it: ZeRO-3 gathers weights in hooks, and skipping a call on one rank would
        # leave the others waiting.
        if completes.any() or self.lstm._forward_pre_hooks or self.lstm._forward_hooks:
            means = (partial / self.stride).unsqueeze(1)
            _, after = self.lstm(means, (before.hidden.contiguous(), before.cell.contiguous()))
            states = torch.where(completes.unsqueeze(1), torch.stack(after), states)
            partial = torch.where(completes.unsqueeze(1), 0.0, partial)
        flat = states.permute(2, 0, 1, 3).flatten(1)
        cache.update_recurrent_state(torch.cat((flat, partial), dim=1), self.layer_index, state_idx=MEMORY)
        return torch.sigmoid(self.gate(hidden)) * self.out_proj(before.hidden[-1]).unsqueeze(1)

    def _means(self, hidden: torch.Tensor, blocks: Blocks, before: MemoryState | None) -> torch.Tensor:
        """Compute the mean of each completed block, `[n, D]`."""
        index = blocks.first_token.unsqueeze(1) + torch.arange(self.stride, device=hidden.device)
        flat = hidden.flatten(0, 1)
        if before is None:
            return flat[index].mean(1)
        inside = (index >= blocks.document_begins.unsqueeze(1)).unsqueeze(-1)
        sums = torch.where(inside, flat[index.clamp(min=0)], 0.0).sum(1)
        return (sums + torch.where((blocks.within == 0).unsqueeze(1), before.partial[blocks.owner], 0.0)) / self.stride

    def _run(
        self, means: torch.Tensor, blocks: Blocks, before: MemoryState | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Run the LSTM over each document's blocks, in one call without padding steps.

        `[n, D]` → the state after each block `[n, H]`, and h and c `[M, N', H]` of the N' documents that completed a
        block. If no document did, the LSTM still runs on one step of zeros: under ZeRO-3, a rank that skipped it would
        leave the others waiting for its weights.
        """
        having = blocks.counts > 0
        if not having.any():
            states, _ = self.lstm(means.new_zeros(1, 1, means.shape[1]))
            return states[0, :0], None
        row = (having.cumsum(0) - 1).to(means.device)[blocks.owner]
        padded = means.new_zeros(int(having.sum()), int(blocks.counts.max()), means.shape[1])
        padded[row, blocks.within] = means
        packed = pack_padded_sequence(padded, blocks.counts[having], batch_first=True, enforce_sorted=False)
        chosen = having.to(means.device)
        initial = (
            None if before is None else (before.hidden[:, chosen].contiguous(), before.cell[:, chosen].contiguous())
        )
        states, after = self.lstm(packed, initial)
        return pad_packed_sequence(states, batch_first=True)[0][row, blocks.within], after

    def _recall(self, cache: Cache, hidden: torch.Tensor, documents: Documents) -> MemoryState:
        """Return each document's state at the start of this call, from the cache if it continues a cached document."""
        layers, size, width = self.lstm.num_layers, self.lstm.hidden_size, hidden.shape[-1]
        flat = hidden.new_zeros(len(documents.lengths), 2 * layers * size + width)
        known = cache.get_recurrent_state(self.layer_index, MEMORY)
        if known is not None:
            goes_on = (documents.continued > 0).unsqueeze(1)
            flat = flat.index_copy(0, documents.number[:, 0], torch.where(goes_on, known, 0.0))
        states, partial = flat.split((2 * layers * size, width), dim=1)
        state, cell = states.unflatten(1, (2, layers, size)).permute(1, 2, 0, 3)
        return MemoryState(state, cell, partial)

    def _remember(
        self,
        cache: Cache,
        hidden: torch.Tensor,
        documents: Documents,
        blocks: Blocks,
        before: MemoryState,
        after: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Store the state of each row's last document in the cache."""
        having = (blocks.counts > 0).nonzero().squeeze(1).to(hidden.device)
        states = [before.hidden, before.cell]
        if after is not None:
            states = [old.index_copy(1, having, new) for old, new in zip(states, after, strict=True)]
        last = documents.number[:, -1]
        # The tokens after the last completed block, or all tokens of the document if it completed none.
        unfinished = blocks.unfinished[last].clamp(max=documents.lengths[last]).unsqueeze(1)
        newest = hidden[:, -min(self.stride, hidden.shape[1]) :]
        age = torch.arange(newest.shape[1] - 1, -1, -1, device=hidden.device)
        partial = torch.where((age < unfinished).unsqueeze(-1), newest, 0.0).sum(1)
        completed_none = (blocks.counts.to(hidden.device)[last] == 0).unsqueeze(1)
        partial = partial + torch.where(completed_none, before.partial[last], 0.0)
        flat = torch.stack(states)[:, :, last].permute(2, 0, 1, 3).flatten(1)
        cache.update_recurrent_state(torch.cat((flat, partial), dim=1), self.layer_index, state_idx=MEMORY)


class OrderedLSTM(nn.LSTM):
    """An LSTM whose weights always receive their gradients in the same order, the last weight's first.

    On a CPU, `nn.LSTM`'s order differs between sequences of equal and unequal lengths. DeepSpeed reduces gradients in the
    order in which they arrive on each rank, so ZeRO-1 summed gradients of different weights.
    """

    def forward(self, sequences: Any, initial: tuple[torch.Tensor, torch.Tensor] | None = None) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(sequences, initial)
        weights = self._flat_weights
        ordered = list(weights)
        for count in range(1, len(weights) + 1):  # each gradient waits for those of the later weights
            ordered[:count] = Together.apply(*ordered[:count])
        self._flat_weights = ordered
        try:
            return super().forward(sequences, initial)
        finally:
            self._flat_weights = weights


class Together(torch.autograd.Function):
    """Return tensors unchanged and pass their gradients on only once all of them have arrived."""

    @staticmethod
    def forward(context: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


@dataclass(frozen=True)
class Blocks:
    """The blocks that are completed in a batch.

    Per document: `counts` `[N]` (on the CPU) is how many blocks it completes, `unfinished` `[N]` how many tokens follow
    the last of them.

    Per block: `owner` `[n]` is its document, `within` `[n]` its index among the blocks that the document completes in
    this batch, `first_token` `[n]` the index of its first token in the flattened batch. A block that began in an earlier
    call has its `first_token` before `document_begins` `[n]`, the index of its document's first token.
    """

    stride: int
    counts: torch.Tensor
    unfinished: torch.Tensor
    owner: torch.Tensor
    within: torch.Tensor
    first_token: torch.Tensor
    document_begins: torch.Tensor

    @classmethod
    def of(cls, documents: Documents, stride: int) -> Blocks:
        phase = torch.zeros_like(documents.lengths)
        if documents.carried is not None:
            phase[documents.number[:, 0]] = documents.carried % stride
        completed = (phase + documents.lengths) // stride
        owner = torch.repeat_interleave(completed)
        within = torch.arange(len(owner), device=owner.device) - (completed.cumsum(0) - completed)[owner]
        begins = documents.first_token[owner]
        return cls(
            stride=stride,
            counts=completed.cpu(),
            unfinished=(phase + documents.lengths) % stride,
            owner=owner,
            within=within,
            first_token=begins - phase[owner] + within * stride,
            document_begins=begins,
        )

    def read_by(self, documents: Documents, per_document: bool) -> torch.Tensor:
        """Return the row of the states that each token reads, `[B, T]`: that of the block before its own.

        If that block was not completed in this call, it is the row after the last block's or, with `per_document`, the
        document's own row after them.
        """
        total = len(self.owner)
        block = documents.offset // self.stride
        entered = torch.full_like(block, total)
        if per_document:
            earlier = torch.zeros_like(documents.lengths)
            earlier[documents.number[:, 0]] = documents.continued // self.stride
            block = block - earlier[documents.number]
            entered = entered + documents.number
        first = F.pad(self.counts.cumsum(0)[:-1], (1, 0)).to(block.device)
        return torch.where(block == 0, entered, first[documents.number] + block - 1)
