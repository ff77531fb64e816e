"""Tests run on one thread: the networks are tiny, and results do not depend on the machine's cores."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # handwritten.py
torch.set_num_threads(1)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process end without curves and report: seconds of drawing that most tests of runs do not look at."""
    monkeypatch.setattr("gankit.pictures.curves", lambda groups, path: None)
    monkeypatch.setattr("gankit.report.write", lambda runs, path: path)
