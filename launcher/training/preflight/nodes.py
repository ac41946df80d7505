"""Checks that need several machines: clocks, the shared file system, and the speed of the network.

All ranks of an initialised process group call them. The ranks with local rank 0 represent their nodes. If there is only one
node, all its ranks take part instead.
"""

from __future__ import annotations

import secrets
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.environment import Environment
from launcher.training.preflight.findings import GREEN, RED, YELLOW, Finding, merge

CLOCK_ROUNDS = 5
CLOCK_TOLERANCE, CLOCK_LIMIT = 1.0, 30.0  # seconds
# Seconds. NFS caches folders, so another node's new file may only be visible after a minute.
VISIBLE_WITHIN = 75.0
MEGABYTES = 16  # size of a transfer
ROUNDS = 3
SLOW, TOO_SLOW = 0.5, 0.1  # relative to the median node's speed


class Nodes:
    """The ranks that represent their nodes, and the nodes' names. `is_member`: whether this rank is one of them."""

    def __init__(self, environment: Environment):
        self.device = environment.device
        everyone = gather((environment.rank, environment.local_rank, socket.gethostname()))
        leaders = [place for place in everyone if place[1] == 0]
        places = leaders if len(leaders) > 1 else everyone
        hosts = [host for _, _, host in places]
        self.ranks = [rank for rank, _, _ in places]
        self.names = [host if hosts.count(host) == 1 else f"{host} rank {rank}" for rank, _, host in places]
        self.group = dist.new_group(self.ranks)
        self.is_member = environment.rank in self.ranks
        self.index = self.ranks.index(environment.rank) if self.is_member else None


def gather(value: object) -> list:
    """Return the values of all ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_nodes(
    environment: Environment, output: str | None, data: str | None, local: list[Finding]
) -> tuple[list[Finding], list[str]]:
    """Merge the nodes' own findings, add the checks between nodes, and return both with the nodes' names.

    The result is the same on all ranks.

    output, data: the run folder, and a file of the data, that every node must see; None if unknown.
    """
    nodes = Nodes(environment)
    output, data = gather((output, data))[0]  # a node that does not see the data has reported that in `local`
    everyone = gather(local if nodes.is_member else None)
    findings = merge({name: everyone[rank] for name, rank in zip(nodes.names, nodes.ranks, strict=True)})
    findings.append(judge_clocks(dict(zip(nodes.names, _clock_offsets(nodes), strict=True))))
    if output is not None:
        findings.append(_check_shared_folder(nodes, output))
    if data is not None:
        findings.append(_check_shared_file(nodes, data))
    return findings + _check_network(nodes), nodes.names


def _clock_offsets(nodes: Nodes) -> list[float]:
    """Return the seconds by which each node's clock is ahead of the first node's.

    Clocks are read right after a barrier. Of several rounds the smallest offset counts, because delays make it larger.
    """
    looks = []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        times = gather(time.time())
        looks.append([times[rank] - times[nodes.ranks[0]] for rank in nodes.ranks])
    return [min(offsets, key=abs) for offsets in zip(*looks, strict=True)]


def judge_clocks(offsets: dict[str, float]) -> Finding:
    """Judge clock offsets in seconds: red if timeouts, locks and file times cannot be compared between nodes."""
    middle = statistics.median_low(sorted(offsets.values()))
    off = {name: seconds - middle for name, seconds in offsets.items() if abs(seconds - middle) > CLOCK_TOLERANCE}
    if not off:
        spread = max(offsets.values()) - min(offsets.values())
        return Finding("clocks", GREEN, f"within {max(spread, 0.001):.3f} s of each other on {len(offsets)} nodes")
    level = RED if max(map(abs, off.values())) > CLOCK_LIMIT else YELLOW
    if len(offsets) == 2:  # either of the two may be the wrong one
        (first, second), apart = offsets, max(offsets.values()) - min(offsets.values())
        return Finding(
            "clocks",
            level,
            f"those of {first} and {second} are {apart:.1f} s apart",
            "synchronise the wrong one (chrony, ntpd)",
        )
    said = ", ".join(f"{name} is {seconds:+.1f} s off" for name, seconds in off.items())
    return Finding("clocks", level, said, "synchronise their clocks (chrony, ntpd), or exclude these nodes", tuple(off))


def _check_shared_folder(nodes: Nodes, output: str) -> Finding:
    """Check that each node can write a file into the run folder and sees the files of all others."""
    folder = Path(output).absolute()
    probe = gather(secrets.token_hex(8))[0]
    created = not folder.exists()
    created = gather(created)[0]
    written = gather(
        _try(lambda: _write(folder / f".{probe}-{nodes.index}"), nodes)
    )  # also a barrier: no node looks before all have written
    missing = _wait_for({folder / f".{probe}-{n}" for n in range(len(nodes.ranks))}) if nodes.is_member else set()
    blind = gather(bool(missing) and not any(written))
    if nodes.is_member:
        (folder / f".{probe}-{nodes.index}").unlink(missing_ok=True)
    dist.barrier()
    if created and dist.get_rank() == 0 and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    failed = [f"{name}: {written[rank]}" for name, rank in zip(nodes.names, nodes.ranks, strict=True) if written[rank]]
    if failed:
        return Finding(
            "run folder",
            RED,
            f"{folder} cannot be written: {', '.join(failed)}",
            "set output to a folder on a file system that all nodes share",
        )
    unseen = [name for name, rank in zip(nodes.names, nodes.ranks, strict=True) if blind[rank]]
    if unseen:
        return Finding(
            "run folder",
            RED,
            f"{folder} is not the same folder everywhere: {', '.join(unseen)} do not see the others' files",
            "set output to a folder on a file system that all nodes share",
        )
    return Finding(
        "run folder", GREEN, f"all {len(nodes.ranks)} nodes can write to {folder} and see each other's files"
    )


def _try(attempt: Callable, nodes: Nodes) -> str:
    """Run `attempt` on the ranks that represent a node; return the file system's error, or an empty string."""
    if not nodes.is_member:
        return ""
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(socket.gethostname())


def _wait_for(files: set[Path]) -> set[Path]:
    """Wait for files to appear, and return those that are still missing after `VISIBLE_WITHIN`."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while (missing := {file for file in files if not file.exists()}) and time.monotonic() < deadline:
        for folder in {file.parent for file in missing}:
            if folder.is_dir():
                list(folder.iterdir())  # makes NFS refresh its cache
        time.sleep(0.2)
    return missing


def _check_shared_file(nodes: Nodes, path: str) -> Finding:
    """Check that all nodes read the same index of the data."""
    try:
        seen = Path(path).read_bytes()
    except OSError:
        seen = None
    contents = gather(hash_of(seen))
    first = contents[nodes.ranks[0]]
    others = [name for name, rank in zip(nodes.names, nodes.ranks, strict=True) if contents[rank] != first]
    if first is None or others:
        return Finding(
            "shared data",
            RED,
            f"{path} is missing or different on {', '.join(others or nodes.names[:1])}",
            "put the data on a file system that all nodes share, or copy it to each node",
        )
    return Finding("shared data", GREEN, f"{path} is the same on all {len(nodes.ranks)} nodes")


def hash_of(content: bytes | None) -> str | None:
    """Return a hash for comparing contents; None if there is no content."""
    from hashlib import sha256

    return None if content is None else sha256(content).hexdigest()


def _check_network(nodes: Nodes) -> list[Finding]:
    """Measure the speed of an all-reduce, of an all-to-all, and of each link in a ring of the nodes."""
    if not nodes.is_member:
        dist.barrier()
        return gather(None)[nodes.ranks[0]]
    count = len(nodes.ranks)
    numbers = MEGABYTES * 250_000 // count * count  # of fp32, a multiple of the number of nodes
    sent = torch.ones(numbers, device=nodes.device)
    received = torch.empty_like(sent)
    reduced = _speed(nodes, lambda: dist.all_reduce(sent, group=nodes.group))
    swapped = _speed(nodes, lambda: dist.all_to_all_single(received, sent, group=nodes.group))
    links = _link_speeds(nodes, sent)
    dist.barrier()
    findings = [
        Finding("all-reduce", GREEN, f"{reduced:.2f} GB/s between {count} nodes"),
        Finding("all-to-all", GREEN, f"{swapped:.2f} GB/s between {count} nodes"),
        judge_links(nodes.names, links),
    ]
    return gather(findings)[nodes.ranks[0]]


def _speed(nodes: Nodes, collective: Callable[[], object]) -> float:
    collective()  # not timed, because the first call opens the connections
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier(nodes.group)
        begin = time.perf_counter()
        collective()
        _finish(nodes.device)
        seconds.append(time.perf_counter() - begin)
    return MEGABYTES / 1000 / statistics.median(seconds)


def _link_speeds(nodes: Nodes, data: torch.Tensor) -> list[float]:
    """Measure the GB/s from each node to the next in a ring, one link at a time, on the receiver."""
    count, speeds = len(nodes.ranks), {}
    for sender in range(count):
        receiver = (sender + 1) % count
        if nodes.index == sender:
            for _ in range(ROUNDS):
                dist.recv(torch.empty(1, device=nodes.device), nodes.ranks[receiver], group=nodes.group)
                dist.send(data, nodes.ranks[receiver], group=nodes.group)
        elif nodes.index == receiver:
            seconds = []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                dist.send(torch.ones(1, device=nodes.device), nodes.ranks[sender], group=nodes.group)
                dist.recv(torch.empty_like(data), nodes.ranks[sender], group=nodes.group)
                _finish(nodes.device)
                seconds.append(time.perf_counter() - begin)
            speeds[sender] = data.nbytes / 1e9 / statistics.median(seconds)
        dist.barrier(nodes.group)  # otherwise a node's work on its other link would be timed as well
    known: list[dict[int, float]] = [{}] * count
    dist.all_gather_object(known, speeds, group=nodes.group)
    return [value for _, value in sorted({n: v for part in known for n, v in part.items()}.items())]


def judge_links(names: list[str], speeds: list[float]) -> Finding:
    """Judge the links between nodes and name the nodes that are slow on both of their links.

    speeds: GB/s from node i to the next one in the ring. A healthy neighbour of a slow node is fast on its other link, so
    at least three nodes are needed to tell which one is slow.
    """
    best = {name: max(speeds[n], speeds[n - 1]) for n, name in enumerate(names)}
    usual = statistics.median(best.values())
    slow = {name: speed for name, speed in best.items() if speed < SLOW * usual}
    if slow:
        level = RED if min(slow.values()) < TOO_SLOW * usual else YELLOW
        said = ", ".join(f"{name} reaches its neighbours at {speed:.2f} GB/s" for name, speed in slow.items())
        return Finding(
            "links", level, f"{said}, the others at {usual:.2f}", f"sbatch --exclude={','.join(slow)}", tuple(slow)
        )
    if len(names) == 2 and min(speeds) < SLOW * max(speeds):
        return Finding(
            "links",
            YELLOW,
            f"{min(speeds):.2f} GB/s one way and {max(speeds):.2f} the other between {' and '.join(names)}",
            "test each of them with a third node",
        )
    return Finding("links", GREEN, f"{min(speeds):.2f} to {max(speeds):.2f} GB/s from each node to the next")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
