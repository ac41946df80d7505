"""The weights of a checkpoint one parameter at a time, whatever the model's size and the number of ranks that wrote it.

DeepSpeed's ranks each keep their pieces of the fp32 weights, flat, one behind the other, between the two moments of
Adam. Its own converter loads the files of all ranks at once; here they are mapped into memory, a parameter's pieces are
copied, and their pages are given back: for 350 MB of weights on two ranks, a process of 0.44 GB against 2.2 GB, 0.42 GB
of either being the libraries. (Its two simpler converters refuse expert parallelism under ZeRO-3.)
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
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # DeepSpeed, whose classes are in the files, warns where it is not set

from launcher.errors import ConfigurationError
from launcher.training.checkpoints.states import load_state

# Expert weights as AutoEP keeps them (gate, up, down) and as the model does (gate over up, down).
FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


class CheckpointWeights:
    """The fp32 weights in a checkpoint's files under ZeRO 1, 2 or 3, with AutoEP or without.

    Raises `ConfigurationError` where the files are of none of these.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        # of each parameter, by expert-parallel rank: where the piece begins in the parameter, and the piece
        self._pieces: dict[str, dict[int, list[tuple[int, torch.Tensor]]]] = defaultdict(lambda: defaultdict(list))
        # of each of AutoEP's tensors, by expert-parallel rank: which experts they are
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
        """Fill `target`, of the parameter's shape and any dtype, with the parameter `name`.

        Takes no more memory beside it than the share of one expert-parallel rank in it. Raises `ConfigurationError`
        where the checkpoint has no such parameter, or one of another size.
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
            length = min(len(piece), len(target) - begin)  # the last is padded
            if begin == filled and length > 0:
                target[begin : begin + length].copy_(piece[:length])
                filled += length
            _give_back(piece)
        if filled != len(target):
            raise ConfigurationError(
                f"{self.checkpoint} holds {filled} of the {len(target)} values of {name}; it is not of this model"
            )

    def _add_stage_3(self, rank: int, ranks: int, state: dict, model: dict) -> None:
        """Every parameter is cut into as many equal pieces as its group has ranks."""
        layers = _autoep_layers(model)
        groups = state.get("ds_zero_partition_groups")  # where experts are spread
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
        """A group's parameters are laid one behind the other and the whole is cut, so that a piece may be any part."""
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
                # The ranks come in order, so what is there already lies before.
                known = self._pieces[name][expert_rank]
                begin = known[-1][0] + len(known[-1][1]) if known else 0
                known.append((begin, flat[place.start : place.start + place.numel]))


def _autoep_layers(model_states: dict) -> dict[str, dict]:
    """AutoEP's description of the layer that a tensor of experts belongs to, by the tensor's name."""
    layers = model_states.get("ds_autoep_layers") or []
    return {f"{layer['module_path']}.experts.{own}": layer for layer in layers for own in ("w1", "w2", "w3")}


def _placement(layer: dict) -> dict[int, list[int]]:
    return {entry["rank"]: entry["experts"] for entry in layer["expert_placement"]["ranks"]}


def _rank_of(path: Path) -> int:
    return int(re.search(r"zero_pp_rank_(\d+)_", path.name)[1])


def _model_states_of(optimizer_states: Path) -> Path:
    name = optimizer_states.name.removeprefix("bf16_").replace("optim_states", "model_states")
    return optimizer_states.with_name(name)


def _give_back(piece: torch.Tensor) -> None:
    """Let the system have the pages of a mapped tensor again, which it reads anew where they are asked for.

    Of the whole storage that it is a part of: the system maps more pages than were touched.
    """
    storage = piece.untyped_storage()
    begin = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - begin
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")
