"""Triton decides at import whether it interprets, so the tests that launch kernels without a GPU run in a process of
their own, which test_interpreter.py starts with the variable set."""

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
