"""LSTM memory: a slow recurrent state beside the local attention, read through a gate.

The LSTM advances once a block of S tokens, on the block's mean. Token t of a document reads the state after the last
completed block before its own (zero in the first), so nothing of the block itself, or of the future, leaks in:

    s_j = LSTM(mean(x_{jS} … x_{jS+S-1})),   out_t = σ(W_g x_t) * W_o s_{⌊t/S⌋-1}

After Hochreiter & Schmidhuber 1997. Documents are laid out as `[documents, blocks]` for one call of `nn.LSTM`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

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
        states, _ = self.lstm(self._block_means(hidden, documents))  # [N, blocks, memory]
        # Read through the small projection before spreading the states over tokens.
        states = F.pad(self.out_proj(states), (0, 0, 1, 0))  # block 0 reads zeros
        block = documents.offset // self.stride
        return torch.sigmoid(self.gate(hidden)) * states[documents.number, block]

    def _block_means(self, hidden: torch.Tensor, documents: Documents) -> torch.Tensor:
        """Mean of each completed block, `[N, blocks, D]`; zero where a document has no such block.

        There is always at least one block, so that every rank runs the LSTM in every forward: under ZeRO-3 a rank that
        skipped it would leave the others waiting for its weights.
        """
        blocks = max(1, (documents.longest - 1) // self.stride)
        inside = torch.arange(blocks * self.stride, device=hidden.device)
        flat = hidden.flatten(0, 1)
        index = documents.first_token.unsqueeze(1) + inside
        ends = torch.cat((documents.first_token[1:], documents.first_token.new_tensor([len(flat)])))
        complete = (index < ends.unsqueeze(1)).unflatten(1, (blocks, self.stride)).all(-1)
        gathered = flat[index.clamp(max=len(flat) - 1)].unflatten(1, (blocks, self.stride))
        return torch.where(complete.unsqueeze(-1), gathered.mean(2), 0.0)
