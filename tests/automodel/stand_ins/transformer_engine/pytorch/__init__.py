"""What the package offers at its top."""

# ruff: noqa: F401

import torch

from .constants import DType
from .quantizers import Float8BlockQuantizer, Float8CurrentScalingQuantizer


def get_cudnn_version():
    encoded = torch.backends.cudnn.version() or 91900
    return encoded // 10_000, encoded // 100 % 100, encoded % 100


def is_fp8_available(return_reason=False):
    return (True, "") if return_reason else True


def is_fp8_block_scaling_available(return_reason=False):
    return (True, "") if return_reason else True
