"""SLURM's compressed node lists."""

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.environment import detect_environment
from launcher.errors import ConfigurationError
from launcher.node_list import expand_node_list


@pytest.mark.parametrize(
    ("compressed", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,7],gpu-a[1-2]b", ["node01", "node02", "node03", "node7", "gpu-a1b", "gpu-a2b"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("login.site.org,c[5]", ["login.site.org", "c5"]),
    ],
)
def test_a_list_becomes_its_hosts(compressed, hosts):
    assert expand_node_list(compressed) == hosts
    if shutil.which("scontrol"):  # SLURM's own result, which needs no running cluster
        said = subprocess.run(["scontrol", "show", "hostnames", compressed], capture_output=True, text=True, timeout=30)
        if said.returncode == 0:
            assert said.stdout.split() == hosts


@pytest.mark.parametrize("compressed", ["", "n[1-2", "n[2-1]", "n[a-b]", "n[1-2-3]", "a,,b", "a b", "n[]", "n]1["])
def test_an_invalid_list_is_refused(compressed):
    with pytest.raises(ConfigurationError, match="MASTER_ADDR"):
        expand_node_list(compressed)


@settings(max_examples=200, deadline=None)
@given(
    st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z]", fullmatch=True),
    st.from_regex(r"[a-z]{0,3}", fullmatch=True),
    st.integers(1, 4),
    st.lists(st.integers(0, 9999), min_size=1, max_size=8, unique=True),
)
def test_every_list_of_numbered_hosts_is_expanded(prefix, suffix, width, numbers):
    """The test compresses lists as SLURM does: numbers of one width, and neighbours as ranges."""
    inside, run = [], []
    for number in [*numbers, None]:
        if run and number == run[-1] + 1 and len(f"{number:0{width}}") == len(f"{run[0]:0{width}}"):
            run.append(number)
            continue
        if run:
            first, last = f"{run[0]:0{width}}", f"{run[-1]:0{width}}"
            inside.append(first if len(run) == 1 else f"{first}-{last}")
        run = [number]
    hosts = [f"{prefix}{number:0{width}}{suffix}" for number in numbers]
    assert expand_node_list(f"{prefix}[{','.join(inside)}]{suffix}") == hosts


STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[07-10]"}  # fmt: skip


def test_srun_without_a_master_address_uses_the_first_node():
    variables = dict(STEP)
    assert detect_environment(variables).world_size == 2
    assert variables["MASTER_ADDR"] == "gpu07" and 15000 <= int(variables["MASTER_PORT"]) < 30000
    given_already = {**STEP, "MASTER_ADDR": "ib0.gpu07", "MASTER_PORT": "29500"}
    detect_environment(given_already)
    assert (given_already["MASTER_ADDR"], given_already["MASTER_PORT"]) == ("ib0.gpu07", "29500")
    after_a_restart = {**STEP, "SLURM_RESTART_COUNT": "1"}
    detect_environment(after_a_restart)
    assert after_a_restart["MASTER_PORT"] != variables["MASTER_PORT"]
