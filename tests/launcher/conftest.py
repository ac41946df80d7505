"""Real training runs for tests: processes on gloo with small data and a small model."""

import subprocess
from pathlib import Path

import pytest

from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.settings import Settings
from tests.launcher.trainer import Trainer
from tests.small_model import SIZES


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    prepare("sample", folder, Settings(seq_len=64), progress=False)
    return folder


@pytest.fixture(scope="session")
def exported(sample_data, tmp_path_factory) -> Path:
    """A model folder with the sample's tokenizer and random weights, far enough from zero that all of them matter."""
    import shutil

    import torch

    from data_pipeline.loading.reader import ShardFolder
    from model import LiquidConfig, LiquidForCausalLM

    torch.manual_seed(0)
    model = LiquidForCausalLM(LiquidConfig(**SIZES).sized_for(ShardFolder(sample_data).vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("exported") / "small"
    shutil.copytree(sample_data / "tokenizer", folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, sample_data) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("runs"), sample_data)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few pages, which `tests.launcher.disk.fill` can fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
