"""Select DeepSpeed's CPU backend if there is no GPU.

Import this before DeepSpeed, which detects its device when it is imported and warns if none is set.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
