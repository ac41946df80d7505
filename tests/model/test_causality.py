"""No token sees a later one, and no document sees another, through any path."""

import pytest
import torch

from model.attention import LocalAttention, RotaryPositions, local_mask
from model.block import LiquidBlock
from model.convolution import DeformableConvolution
from model.documents import Documents, positions_from_mask
from model.embedding import LiquidEmbedding
from model.memory import LSTMMemory
from model.moe import MixtureOfExperts

TOKENS, CHANGED = 50, 23


def apply(component: torch.nn.Module, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Call any component on hidden states `[B, T, D]` and return its main output."""
    documents = Documents.from_positions(positions)
    rotation = RotaryPositions(component.sizes)(positions, hidden.dtype)
    mask = local_mask(component.sizes, hidden, documents, None)
    if isinstance(component, LocalAttention):
        output = component(hidden, rotation, mask)
    elif isinstance(component, LiquidBlock):
        output = component(hidden, rotation, documents, mask)
    elif isinstance(component, MixtureOfExperts):
        output = component(hidden)
    else:
        output = component(hidden, documents)
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(
    params=[LiquidEmbedding, LocalAttention, DeformableConvolution, LSTMMemory, MixtureOfExperts, LiquidBlock]
)
def component(request, config):
    torch.manual_seed(0)
    layer = () if request.param in (LiquidEmbedding, MixtureOfExperts) else (0,)
    made = request.param(config, *layer)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.sizes = config
    return made.eval()


@torch.no_grad()
def test_a_component_sees_no_later_token(component, config):
    hidden = torch.randn(2, TOKENS, config.hidden_size)
    positions = torch.arange(TOKENS).repeat(2, 1)
    changed = hidden.clone()
    changed[:, CHANGED] += 1.0
    before, after = apply(component, hidden, positions), apply(component, changed, positions)
    assert torch.equal(before[:, :CHANGED], after[:, :CHANGED])
    assert not torch.allclose(before[:, CHANGED:], after[:, CHANGED:])


@torch.no_grad()
def test_a_packed_document_gives_the_same_output_as_alone(component, config):
    hidden = torch.randn(1, TOKENS, config.hidden_size)
    lengths = [7, 1, 22, 20]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = apply(component, hidden, positions).split(lengths, dim=1)
    for part, together in zip(hidden.split(lengths, dim=1), packed, strict=True):
        alone = apply(component, part, torch.arange(part.shape[1]).unsqueeze(0))
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_sees_no_later_token(model, ids):
    changed = ids.clone()
    changed[:, CHANGED] = (changed[:, CHANGED] - 4 + 17) % 97 + 4
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :CHANGED], after[:, :CHANGED])
    assert not torch.allclose(before[:, CHANGED:], after[:, CHANGED:])


@torch.no_grad()
def test_a_packed_row_gives_the_logits_of_its_documents_alone(model, ids):
    lengths = [11, 2, 30, 7]
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(len(ids), 1)
    packed = model(ids, position_ids=positions).logits.split(lengths, dim=1)
    for part, together in zip(ids.split(lengths, dim=1), packed, strict=True):
        torch.testing.assert_close(together, model(part).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(model, ids, side):
    mask = torch.ones_like(ids)
    text = slice(19, None) if side == "left" else slice(None, -19)
    mask[0] = 0
    mask[0, text] = 1
    padded = model(ids, attention_mask=mask).logits[:1, text]
    torch.testing.assert_close(padded, model(ids[:1, text]).logits, atol=1e-5, rtol=1e-5)


def test_padding_is_a_document_of_its_own():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions_from_mask(mask, None).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]


def test_documents_are_counted_over_all_rows():
    documents = Documents.from_positions(torch.tensor([[0, 1, 0, 1], [5, 6, 7, 0]]))
    assert documents.number.tolist() == [[0, 0, 1, 1], [2, 2, 2, 3]]
    assert documents.offset.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert documents.first_token.tolist() == [0, 2, 4, 7]
    assert documents.lengths.tolist() == [2, 2, 3, 1]
