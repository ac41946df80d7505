"""A real cluster for the session, a copy of the project on it, and an undisturbed run to compare others with."""

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.cluster.jobs import STEPS, Submitter, curves
from tests.cluster.virtual_cluster import VirtualCluster, what_is_missing
from tests.small_model import SIZES

PROJECT = Path(__file__).parents[2]
RUN = {
    "max_steps": STEPS,
    "checkpoint_every": 6,
    "global_batch_rows": 32,
    "micro_batch_rows": 8,
    "learning_rate": 0.003,
    "warmup_steps": 2,
    "loss_on": "answer",
    "expert_parallel_size": 2,
}


@pytest.fixture(scope="session")
def cluster():
    if reason := what_is_missing():
        pytest.skip(reason)
    with open(Path(tempfile.gettempdir(), "lfm-cluster.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a machine can have one cluster at a time
        cluster = VirtualCluster()
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """Copy the working tree's files that git does not ignore, as a clone would have them."""
    folder = tmp_path_factory.mktemp("cluster") / "project"
    command = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    return folder


@pytest.fixture
def submit(cluster, project):
    """Submit batch scripts; when the test ends, jobs that still run are cancelled and nodes without power are booted."""
    submitter = Submitter(cluster, project, environment={"LFM_VENV": sys.prefix, "OMP_NUM_THREADS": "1"})
    yield submitter
    submitter.clear()


@pytest.fixture(scope="session")
def data(project) -> Path:
    """The built-in sample, prepared by one process on this machine."""
    command = [sys.executable, "-m", "launcher.cli", "prepare", "sample", "--seq-len", "64", "--out", "data/local"]
    subprocess.run(command, cwd=project, capture_output=True, timeout=120, check=True)
    return project / "data" / "local"


@pytest.fixture(scope="session")
def configured(project, data) -> list[str]:
    """The arguments of `slurm/train.sbatch` for a small run, except `output`."""
    settings = json.loads((project / "ds_configs" / "zero3.json").read_text())
    del settings["fp16"]  # not every CPU supports it
    (project / "small.json").write_text(json.dumps(settings))
    (project / "model.yaml").write_text(yaml.safe_dump(SIZES))
    (project / "run.yaml").write_text(yaml.safe_dump({**RUN, "data": str(data), "model": "model.yaml"}))
    return ["--deepspeed_config", "small.json", "--config", "run.yaml"]


@pytest.fixture(scope="session")
def undisturbed(cluster, project, configured) -> dict[str, dict[int, float]]:
    """The curves of an undisturbed run of two ranks on one node."""
    submitter = Submitter(cluster, project, environment={"LFM_VENV": sys.prefix, "OMP_NUM_THREADS": "1"})
    job = submitter("train", *configured, "output=runs/undisturbed", options=["--nodes=1", "--ntasks-per-node=2"])
    job.finish()
    return curves(project / "runs" / "undisturbed")
