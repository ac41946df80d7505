"""LSTM memory: a slow recurrent state beside the local attention, read through a gate.

The LSTM advances once a block of S tokens, on the block's mean. Token t of a document reads the state after the last
completed block before its own (zero in the first), so nothing of the block itself, or of the future, leaks in:

    s_j = LSTM(mean(x_{jS} … x_{jS+S-1})),   out_t = σ(W_g x_t) * W_o s_{⌊t/S⌋-1}

After Hochreiter & Schmidhuber 1997. All documents' blocks go through one call of `nn.LSTM`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from model.configuration import LiquidConfig
from model.documents import Documents
from model.projection import ResidualProjection


class LSTMMemory(nn.Module):
    """`[B, T, D]` → what each token reads from its document's memory, `[B, T, D]`."""

    def __init__(self, config: LiquidConfig):
        super().__init__()
        self.stride = config.memory_stride
        self.lstm = nn.LSTM(
            config.hidden_size, config.memory_hidden_size, num_layers=config.memory_num_layers, batch_first=True
        )
        self.gate = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = ResidualProjection(config.memory_hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, documents: Documents) -> torch.Tensor:
        stride = self.stride
        blocks = (documents.lengths - 1) // stride  # of each document, those that some token reads; [N]
        counts = blocks.cpu()
        owner = torch.repeat_interleave(blocks)  # of each block, its document
        base = blocks.cumsum(0) - blocks  # of each document, its first block
        within = torch.arange(len(owner), device=hidden.device) - base[owner]
        inside = documents.first_token[owner] + within * stride
        index = inside.unsqueeze(1) + torch.arange(stride, device=hidden.device)
        means = hidden.flatten(0, 1)[index].mean(1)  # [blocks, D]
        states = self._run(means, owner, within, counts)  # [blocks, memory]
        # Read through the small projection before spreading the states over tokens; row 0 is what a first block reads.
        read = F.pad(self.out_proj(states), (0, 0, 1, 0))
        block = documents.offset // stride
        row = torch.where(block == 0, 0, base[documents.number] + block)
        return torch.sigmoid(self.gate(hidden)) * read[row]

    def _run(
        self, means: torch.Tensor, owner: torch.Tensor, within: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """The LSTM over each document's blocks: `[blocks, D]` → `[blocks, memory]`, in one call without padding steps.

        Where no document has a block it runs on one step of zeros all the same: under ZeRO-3 a rank that skipped it
        would leave the others waiting for its weights.
        """
        having = counts > 0
        if not having.any():
            states, _ = self.lstm(means.new_zeros(1, 1, means.shape[1]))
            return states[0]
        row = (having.cumsum(0) - 1).to(owner.device)[owner]
        padded = means.new_zeros(int(having.sum()), int(counts.max()), means.shape[1])
        padded[row, within] = means
        packed = pack_padded_sequence(padded, counts[having], batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return states[row, within]
