"""Compiled kernels for tests, which may be missing only where there is no compiler."""

from __future__ import annotations

import os

import pytest
import torch

from coterie.lm.native import build
from coterie.lm.native.kernels import Kernels, kernels_for


def need_kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    """The kernels, or a skipped test where no C++ compiler is here or they are not wanted; else the test fails."""
    found = kernels_for(dtype, torch.device("cpu"))
    if found is None:
        problem = build.library().problem
        if os.environ.get(build.SWITCH) == "0" or not any(build.compilers(os.environ)):
            pytest.skip(problem)
        pytest.fail(problem)
    return found
