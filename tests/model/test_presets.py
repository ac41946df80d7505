"""Presets have the sizes in their names, and every way to create a model initialises all of it."""

import pytest
import torch

from model import LiquidConfig, LiquidForCausalLM
from model.configuration import preset_names
from model.size import ParameterCount, count_parameters

LED_VOCABULARY = 50_266
PARAMETERS = {
    "tiny": ParameterCount(total=13_219_651, routed=1_769_472, active=12_334_915),
    "base": ParameterCount(total=209_873_155, routed=150_994_944, active=96_626_947),
    "1b": ParameterCount(total=1_017_607_171, routed=805_306_368, active=312_964_099),
    "8b-a1b": ParameterCount(total=7_902_519_299, routed=7_247_757_312, active=1_107_746_819),
}


def preset_without_memory(name: str) -> LiquidForCausalLM:
    with torch.device("meta"):
        return LiquidForCausalLM(LiquidConfig.from_preset(name).sized_for(LED_VOCABULARY))


def uninitialised(model: torch.nn.Module) -> list[str]:
    """Return the names of parameters and buffers that are not finite everywhere."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if not tensor.isfinite().all()]


@pytest.fixture
def memory_begins_as_nan():
    """Fill every allocation with NaN until something is written to it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_every_preset_is_counted():
    assert set(preset_names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_its_total_and_active_parameters(name):
    assert count_parameters(preset_without_memory(name)) == PARAMETERS[name]


def test_presets_are_as_large_as_their_names_say():
    assert PARAMETERS["1b"].total == pytest.approx(1e9, rel=0.05)
    assert PARAMETERS["8b-a1b"].total == pytest.approx(8e9, rel=0.05)
    assert 0.9e9 <= PARAMETERS["8b-a1b"].active <= 1.3e9


@pytest.mark.parametrize("name", ["base", "1b", "8b-a1b"])
def test_the_larger_presets_fit_the_tiles_of_a_gpu(name):
    config = LiquidConfig.from_preset(name)
    assert config.head_dim in (64, 128)
    widths = ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "memory_hidden_size")
    assert [width for width in widths if getattr(config, width) % 128] == []
    assert config.hidden_size // config.deformable_groups in (64, 128)
    assert config.max_position_embeddings % config.sliding_window == 0


def test_active_parameters_leave_out_unchosen_experts_and_a_tied_head_counts_once(config, model):
    expert = 3 * config.moe_intermediate_size * config.hidden_size
    unused = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok) * expert
    count = count_parameters(model)
    assert count.total == sum(tensor.numel() for name, tensor in model.named_parameters() if name != "lm_head.weight")
    assert count.active == count.total - unused


def test_a_model_made_on_the_meta_device_is_initialised_completely(config):
    with torch.device("meta"):
        model = LiquidForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    assert uninitialised(model)
    model.init_weights()
    assert uninitialised(model) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parameters_missing_from_loaded_weights_are_initialised(config, memory_begins_as_nan):
    model = LiquidForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert uninitialised(model) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_made_in_memory_is_initialised_completely(config, memory_begins_as_nan):
    assert uninitialised(LiquidForCausalLM(config)) == []
