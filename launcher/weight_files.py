"""Write and read a model folder's safetensors files tensor by tensor, with the index that transformers reads.

A file's header holds every tensor's type, shape and place. All are known before the first weight is, so only one tensor
has to be in memory. (`safetensors.torch.save_file` needs a whole file's tensors, and copies them; `safe_open` maps files
into memory and keeps everything that was read.) Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from launcher.errors import ConfigurationError

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES = {name: dtype for dtype, name in TYPES.items()}
ALIGNMENT = 8  # of the header's end, as the format requires


def write_shards(
    folder: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    fill: Callable[[str, torch.Tensor], None],
    max_shard_bytes: int,
) -> None:
    """Write `tensors` (shape and type by name) to `folder`; `fill(name, empty tensor)` provides one tensor at a time.

    A file holds at most `max_shard_bytes`, or one larger tensor. If there are several files, also write
    `model.safetensors.index.json`. The weight files are synced to the disk.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    shards = _divide(sizes, max_shard_bytes)
    places: dict[str, str] = {}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="exporting", disable=None) as progress:
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            places |= dict.fromkeys(names, file)
            with open(folder / file, "wb") as stream:
                stream.write(_header({name: tensors[name] for name in names}))
                for name in names:
                    shape, dtype = tensors[name]
                    tensor = torch.empty(shape, dtype=dtype)
                    fill(name, tensor)
                    stream.write(_bytes_of(tensor))
                    progress.update(sizes[name])
                stream.flush()
                os.fsync(stream.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class WeightFiles:
    """Give access to the safetensors files of a model folder: `shapes` by name, and `read` for one tensor.

    Raises `ConfigurationError` if a file is not a safetensors file, or holds a type other than fp32, bf16 and fp16.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, int, torch.dtype]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                try:
                    if length >= path.stat().st_size:
                        raise ValueError("the header is longer than the file")
                    header = json.loads(file.read(length))
                    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
                    ends = [entry["data_offsets"][1] for entry in entries.values()]
                    types = {name: NAMES[entry["dtype"]] for name, entry in entries.items()}
                except (ValueError, AttributeError, KeyError, TypeError) as error:
                    raise ConfigurationError(f"{path} holds no weights in fp32, bf16 or fp16; export again") from error
            if path.stat().st_size != 8 + length + max(ends, default=0):
                raise ConfigurationError(f"{path} is truncated or too long; export again")
            for name, entry in entries.items():
                self.shapes[name] = tuple(entry["shape"])
                self._places[name] = (path, 8 + length + entry["data_offsets"][0], types[name])

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored type; no page of the file stays mapped."""
        path, begin, dtype = self._places[name]
        tensor = torch.empty(self.shapes[name], dtype=dtype)
        with open(path, "rb") as file:
            file.seek(begin)
            file.readinto(_bytes_of(tensor))
        return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor on the CPU, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _divide(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Divide the tensors, in order, into files of at most `most` bytes; a larger tensor gets a file of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def _header(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (shape, dtype) in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
