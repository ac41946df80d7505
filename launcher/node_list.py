"""Expand SLURM's node lists: `node[01-03,7],gpu-a[1-2]b` is node01, node02, node03, node7, gpu-a1b, gpu-a2b."""

from __future__ import annotations

import itertools
import re

from launcher.errors import ConfigurationError

# Names between commas; a comma inside brackets belongs to the name.
NAME = re.compile(r"(?:[^,\[\]\s]|\[[0-9,-]+\])+")
PART = re.compile(r"\[([0-9,-]+)\]|([^\[\]]+)")


def expand_node_list(compressed: str) -> list[str]:
    """Return the hosts in SLURM's order; a name may have several brackets, and numbers keep their leading zeros.

    Raises `ConfigurationError` if it is not a node list.
    """
    names = NAME.findall(compressed)
    if not names or ",".join(names) != compressed:
        raise ConfigurationError(
            f"{compressed!r} is not a SLURM node list; check it with `scontrol show hostnames`, or set MASTER_ADDR"
        )
    hosts = []
    for name in names:
        choices = [_numbers(inside, compressed) if inside else [text] for inside, text in PART.findall(name)]
        hosts += ["".join(parts) for parts in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str, compressed: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigurationError(
                f"{part!r} in the SLURM node list {compressed!r} is not a range of numbers; set MASTER_ADDR instead"
            )
        first, last = match[1], match[2] or match[1]
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return numbers
