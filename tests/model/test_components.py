"""Each fast implementation matches its plain definition, gradients included."""

import torch

from model.convolution import DeformableConvolution, banded_convolution
from model.documents import Documents
from model.embedding import LiquidEmbedding
from model.memory import LSTMMemory
from model.moe import MixtureOfExperts, swiglu


def documents_of(*rows: list[int]) -> Documents:
    return Documents.from_positions(torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]))


def gathered_taps(convolution, hidden, signal, documents):
    """Compute the deformable sum by its definition: every tap interpolates between its two neighbours."""
    delay, strength = convolution.tap_proj(hidden).unflatten(-1, (2, convolution.groups, convolution.taps)).unbind(2)
    delay = (convolution.range - 1) * torch.sigmoid(delay)
    output = torch.zeros_like(signal)
    for row in range(signal.shape[0]):
        for token in range(signal.shape[1]):
            for group in range(convolution.groups):
                for tap in range(convolution.taps):
                    position = delay[row, token, group, tap]
                    whole = int(position.detach().floor())
                    for reach, share in ((whole, 1 - (position - whole)), (whole + 1, position - whole)):
                        if reach <= documents.offset[row, token]:
                            weight = strength[row, token, group, tap] * share
                            output[row, token, group] += weight * signal[row, token - reach, group]
    return output


def test_the_deformable_convolution_matches_its_definition(config):
    torch.manual_seed(0)
    convolution = DeformableConvolution(config, layer_index=0)
    torch.nn.init.normal_(convolution.tap_proj.weight, std=0.5)
    documents = documents_of([9, 31], [40])
    hidden = torch.randn(2, 40, config.hidden_size)
    signal = torch.randn(2, 40, config.deformable_groups, 8, requires_grad=True)
    given = banded_convolution(signal, convolution.tap_weights(hidden, documents))
    expected = gathered_taps(convolution, hidden, signal.clone(), documents)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    inputs = (signal, convolution.tap_proj.weight, convolution.tap_proj.bias)
    target = torch.randn_like(expected)
    for ours, plain in zip(
        torch.autograd.grad((given * target).sum(), inputs),
        torch.autograd.grad((expected * target).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_the_memory_reads_the_state_after_the_last_block_before_the_tokens_own(config):
    torch.manual_seed(0)
    memory = LSTMMemory(config, layer_index=0)
    hidden = torch.randn(2, 30, config.hidden_size)
    given = memory(hidden, documents_of([3, 18, 9], [30]))
    stride = config.memory_stride
    for row, begin, length in ((0, 0, 3), (0, 3, 18), (0, 21, 9), (1, 0, 30)):
        document = hidden[row, begin : begin + length]
        for token in range(length):
            read = torch.zeros(config.memory_hidden_size)
            if blocks := token // stride:
                means = document[: blocks * stride].unflatten(0, (blocks, stride)).mean(1)
                read = memory.lstm(means)[0][-1]
            expected = torch.sigmoid(memory.gate(document[token])) * memory.out_proj(read)
            torch.testing.assert_close(given[row, begin + token], expected, atol=1e-5, rtol=1e-5)


def test_the_memorys_cost_depends_on_the_tokens_and_not_on_the_longest_document(config):
    """A long document among short ones must not pad the others to its length."""
    memory = LSTMMemory(config, layer_index=0)
    steps = []
    memory.lstm.register_forward_pre_hook(lambda _, inputs: steps.append(len(inputs[0].data)))
    hidden = torch.randn(2, 400, config.hidden_size)
    memory(hidden, documents_of([400], [8] * 50))
    assert steps == [2 * 400 // config.memory_stride]  # one step for each block


def test_experts_are_the_weighted_sum_over_the_chosen_ones(config):
    torch.manual_seed(0)
    moe = MixtureOfExperts(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, 11, config.hidden_size)
    probabilities = moe.router.gate(hidden).softmax(-1)
    weights, chosen = probabilities.topk(config.num_experts_per_tok)
    weights = weights / weights.sum(-1, keepdim=True)
    experts = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
    everyone = torch.stack([swiglu(hidden, *expert) for expert in experts], -2)
    picked = everyone.gather(2, chosen.unsqueeze(-1).expand(*chosen.shape, config.hidden_size))
    expected = (picked * weights.unsqueeze(-1)).sum(2) + moe.shared_experts(hidden)
    torch.testing.assert_close(moe(hidden), expected, atol=1e-5, rtol=1e-5)


def test_the_retained_ratio_stays_in_its_bounds_and_is_higher_for_complex_text(config):
    torch.manual_seed(0)
    embedding = LiquidEmbedding(config)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    simple = torch.randn(1, 1, config.hidden_size).repeat(1, 60, 1)
    complex_ = torch.randn(1, 60, config.hidden_size)
    _, error, ratio = embedding(torch.cat((simple, complex_)), documents_of([60], [60]))
    assert ((ratio > config.embedding_minimum_ratio) & (ratio < 1)).all()
    assert (ratio[1, 1:] > ratio[0, 1:] + 0.01).all()
    assert ratio[0, 59] < ratio[1, 59]
    assert ratio[1, 59] > ratio[1, 1]  # a longer text keeps more
    assert (error >= 0).all()


def test_the_embedding_rule_learns_through_the_mask(config):
    torch.manual_seed(0)
    embedding = LiquidEmbedding(config)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    output, *_ = embedding(torch.randn(2, 20, config.hidden_size), documents_of([20], [20]))
    output.square().sum().backward()
    assert (embedding.rule.grad != 0).all()


def test_the_memorys_weights_get_their_gradients_in_one_order_whatever_the_lengths(config):
    """Ranks sum gradients in the order of their arrival, so it must be fixed; with torch's LSTM it varies on a CPU."""
    memory = LSTMMemory(config, layer_index=0)
    arrived = []
    for name, weight in memory.lstm.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    stride, orders = config.memory_stride, set()
    for blocks in ([1, 1], [3, 3], [1, 5], [4, 2], [0, 0]):
        documents = documents_of([stride * n for n in blocks] if any(blocks) else [1, 1])
        memory(
            torch.randn(1, documents.offset.shape[1], config.hidden_size, requires_grad=True), documents
        ).sum().backward()
        orders.add(tuple(arrived))
        arrived.clear()
    assert len(orders) == 1
    assert len(orders.pop()) == len(list(memory.lstm.parameters()))
