"""A model with layers on several devices, as `device_map` places them; here the CPU and torch's `meta`."""

import pytest
import torch
from transformers import DynamicCache

from model import LiquidConfig, LiquidForCausalLM
from model.documents import Documents
from tests.model.conftest import SIZES


@pytest.mark.parametrize("past", [None, 5])
def test_documents_move_to_a_device_as_tensors_do(past):
    documents = Documents.from_positions(torch.tensor([[3, 4, 0, 1], [0, 1, 2, 3]]), past)
    moved = documents.to("meta", non_blocking=True)
    assert isinstance(moved, Documents)
    for name, tensor in vars(documents).items():
        other = getattr(moved, name)
        assert other is None if tensor is None else (other.device.type, other.shape) == ("meta", tensor.shape)


@pytest.mark.extra
@torch.no_grad()
def test_layers_on_two_devices_read_and_decode():
    hooks = pytest.importorskip("accelerate.hooks")
    # Tensors on meta have no values, so the memory cannot tell whether a block is complete; nor can tokens be sorted in fp32.
    config = LiquidConfig(**SIZES | {"memory_every": 3, "experts_implementation": "batched_mm"})
    model = LiquidForCausalLM(config).eval().model
    for module, device in ((model.layers[0], "cpu"), (model.layers[1], "meta"), (model.norm, "meta")):
        hook = hooks.AlignDevicesHook(device, skip_keys=model._skip_keys_device_placement)
        hooks.add_hook_to_module(module.to(device), hook)
    ids, cache = torch.randint(4, 101, (2, 20)), DynamicCache(config=config)
    for part in ids.split([18, 1, 1], dim=1):
        output = model(part, past_key_values=cache)
        assert output.last_hidden_state.device.type == output.router_logits.device.type == "meta"
        assert output.router_logits.shape == (2, *part.shape, 4)


@pytest.mark.extra
def test_a_device_map_splits_neither_a_layer_nor_the_embedding():
    accelerate = pytest.importorskip("accelerate")
    model = LiquidForCausalLM(LiquidConfig(**SIZES | {"num_hidden_layers": 4}))
    places = set()
    for room in range(80_000, 300_000, 2_000):
        places |= set(
            accelerate.infer_auto_device_map(
                model, {"cpu": room, "disk": 10**9}, no_split_module_classes=model._no_split_modules
            )
        )
    assert "model.layers.0" in places and "model.liquid_embedding" in places
    assert [name for name in places if name.startswith(("model.layers.0.", "model.liquid_embedding."))] == []
