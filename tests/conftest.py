"""Tests run on one thread: the networks are tiny, and results do not depend on the machine's cores."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # handwritten.py
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_numbers_whatever_ran_before() -> None:
    """For tests that draw from the global generator."""
    torch.manual_seed(0)
