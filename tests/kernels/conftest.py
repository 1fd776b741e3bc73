"""What the operators' tests run on."""

from __future__ import annotations

import pytest
import torch

from r1_megatron.kernels import library


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not (torch.cuda.is_available() and library.load().with_cuda):
        pytest.skip("needs a CUDA device and a build with nvcc")
    return request.param
