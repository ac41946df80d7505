"""The memory recalls a token that is out of reach of every layer's window."""

import pytest
import torch
import torch.nn.functional as F

from model import LiquidConfig, LiquidForCausalLM
from tests.model.conftest import SIZES

LENGTH, ASKED = 56, 48  # tokens; two layers' windows, delays and convolutions reach 28 back
KEYS, KEY_TOKENS, FILLERS, QUESTION = 2, 10, (20, 24), 5


def documents(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows that begin with one of two keys, continue at random and end with questions; and each row's key."""
    ids = torch.randint(*FILLERS, (number, LENGTH), generator=generator)
    key = torch.randint(KEYS, (number,), generator=generator)
    ids[:, :4] = KEY_TOKENS + key.unsqueeze(1)
    ids[:, ASKED:] = QUESTION
    return ids, key


def share_recalled(memory_every: int) -> float:
    torch.manual_seed(0)
    model = LiquidForCausalLM(LiquidConfig(**SIZES | {"memory_every": memory_every}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(80):
        ids, key = documents(16, generator)
        logits = model(input_ids=ids).logits[:, ASKED:].flatten(0, 1)
        F.cross_entropy(logits, key.repeat_interleave(LENGTH - ASKED)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ids, key = documents(256, generator)
    with torch.no_grad():
        return (model(input_ids=ids).logits[:, -1].argmax(-1) == key).double().mean().item()


@pytest.mark.parametrize(("memory_every", "lowest", "highest"), [(1, 0.99, 1.0), (1000, 0.0, 0.65)])
def test_the_memory_recalls_what_no_window_reaches(memory_every, lowest, highest):
    assert lowest <= share_recalled(memory_every) <= highest
