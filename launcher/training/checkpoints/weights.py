"""Read the weights of a checkpoint one parameter at a time, for any model size and any number of ranks.

Each rank of DeepSpeed stores its pieces of the fp32 weights flat, one after the other, beside the two moments of Adam.
DeepSpeed's own converter loads the files of all ranks at once. Here the files are mapped into memory, a parameter's
pieces are copied, and their pages are released. For 350 MB of weights on two ranks the process takes 0.44 GB instead of
2.2 GB; the libraries alone take 0.42 GB of that. (DeepSpeed's two simpler converters do not support expert parallelism
under ZeRO-3.)
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
from collections import defaultdict
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # The files contain classes of DeepSpeed, which warns on import if this is not set.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from launcher.errors import ConfigurationError
from launcher.training.checkpoints.states import load_state

# AutoEP stores gate, up and down separately; the model stores gate and up in one tensor.
FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


class CheckpointWeights:
    """Give access to the fp32 weights in a checkpoint's files of ZeRO 1, 2 or 3, with or without AutoEP.

    Raises `ConfigurationError` if there are no such files.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        # By parameter and expert-parallel rank: the offset of each piece in the parameter, and the piece.
        self._pieces: dict[str, dict[int, list[tuple[int, torch.Tensor]]]] = defaultdict(lambda: defaultdict(list))
        # By AutoEP tensor and expert-parallel rank: the experts that it holds.
        self._experts: dict[str, dict[int, list[int]]] = {}
        states = sorted(checkpoint.glob("*optim_states.pt"), key=_rank_of)
        if not states:
            raise ConfigurationError(f"{checkpoint} has no optimizer states of ZeRO 1, 2 or 3, which hold the weights")
        for path in states:
            content = load_state(path)["optimizer_state_dict"]
            if "fp32_flat_groups" in content:
                self._add_stage_3(_rank_of(path), len(states), content, load_state(_model_states_of(path)))
            else:
                self._add_stage_1(
                    _rank_of(path), len(states), content, load_state(checkpoint / "mp_rank_00_model_states.pt")
                )

    @torch.no_grad()
    def copy_into(self, target: torch.Tensor, name: str) -> None:
        """Fill `target`, which has the parameter's shape and any dtype, with the parameter `name`.

        Beside `target` this takes at most the memory of one expert-parallel rank's share. Raises `ConfigurationError`
        if the checkpoint has no such parameter, or one of another size.
        """
        module, _, last = name.rpartition(".")
        if name not in self._pieces and last in FUSED and f"{module}.w1" in self._pieces:
            size = target.shape[1] // len(FUSED[last])
            for number, own in enumerate(FUSED[last]):
                self._copy_experts(target.narrow(1, number * size, size), f"{module}.{own}")
        elif name in self._experts:
            self._copy_experts(target, name)
        else:
            self._copy_flat(target.view(-1), name, rank=0)

    def _copy_experts(self, target: torch.Tensor, name: str) -> None:
        for rank, experts in self._experts[name].items():
            local = torch.empty(len(experts), *target.shape[1:])
            self._copy_flat(local.view(-1), name, rank)
            target[experts] = local.to(target.dtype)

    def _copy_flat(self, target: torch.Tensor, name: str, rank: int) -> None:
        pieces = self._pieces[name][rank] if name in self._pieces else []
        filled = 0
        for begin, piece in sorted(pieces, key=lambda found: found[0]):
            length = min(len(piece), len(target) - begin)  # the last piece is padded
            if begin == filled and length > 0:
                target[begin : begin + length].copy_(piece[:length])
                filled += length
            _give_back(piece)
        if filled != len(target):
            raise ConfigurationError(
                f"{self.checkpoint} holds {filled} of the {len(target)} values of {name}; it belongs to another model"
            )

    def _add_stage_3(self, rank: int, ranks: int, state: dict, model: dict) -> None:
        """Add one rank's pieces under ZeRO-3, which cuts each parameter into equal pieces, one per rank of its group."""
        layers = _autoep_layers(model)
        groups = state.get("ds_zero_partition_groups")  # present with expert parallelism
        for number, shapes in enumerate(model["param_shapes"]):
            flat = state["fp32_flat_groups"][number]
            group = groups[number] if groups else {"partition_count": ranks, "partition_rank": rank}
            offset = 0
            for name, shape in shapes.items():
                size = math.ceil(math.prod(shape) / group["partition_count"])
                layer = layers.get(name)
                expert_rank = layer["ep_rank"] if layer else 0
                piece = flat[offset : offset + size]
                self._pieces[name][expert_rank].append((group["partition_rank"] * size, piece))
                if layer:
                    self._experts[name] = _placement(layer)
                offset += size

    def _add_stage_1(self, rank: int, ranks: int, state: dict, model: dict) -> None:
        """Add one rank's pieces under ZeRO 1 or 2, which joins a group's parameters and cuts the whole at any place."""
        layers = _autoep_layers(model)
        before = model["ds_config"].get("use_data_before_expert_parallelism", False)
        for flat, slices in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True):
            for name, place in slices.items():
                layer = layers.get(name)
                expert_rank = 0
                if layer:
                    self._experts[name] = _placement(layer)
                    size = layer["ep_size"]
                    expert_rank = rank // (ranks // size) if before else rank % size
                # The ranks come in order, so this piece follows those already known.
                known = self._pieces[name][expert_rank]
                begin = known[-1][0] + len(known[-1][1]) if known else 0
                known.append((begin, flat[place.start : place.start + place.numel]))


def _autoep_layers(model_states: dict) -> dict[str, dict]:
    """Return AutoEP's description of the layer of each expert tensor, by the tensor's name."""
    layers = model_states.get("ds_autoep_layers") or []
    return {f"{layer['module_path']}.experts.{own}": layer for layer in layers for own in ("w1", "w2", "w3")}


def _placement(layer: dict) -> dict[int, list[int]]:
    return {entry["rank"]: entry["experts"] for entry in layer["expert_placement"]["ranks"]}


def _rank_of(path: Path) -> int:
    return int(re.findall(r"zero_pp_rank_(\d+)_", path.name)[0])


def _model_states_of(optimizer_states: Path) -> Path:
    name = optimizer_states.name.removeprefix("bf16_").replace("optim_states", "model_states")
    return optimizer_states.with_name(name)


def _give_back(piece: torch.Tensor) -> None:
    """Release the memory pages of a mapped tensor; the system reads them again on access.

    The tensor's whole storage is released, because the system maps more pages than were touched.
    """
    storage = piece.untyped_storage()
    begin = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - begin
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")
