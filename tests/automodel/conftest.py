"""Where there is no GPU, Triton's interpreter runs the kernels; it has to be told before anything imports Triton."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
