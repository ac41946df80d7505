"""Imported before DeepSpeed, which looks for its kind of device on import, and warns where nobody has named one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
