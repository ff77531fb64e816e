"""For the tests of the core and of all plugins: one thread, and the same numbers whatever ran before."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    """For tests that draw from the global generator."""
    torch.manual_seed(0)
