"""Tests run on one thread: the networks are tiny, and results do not depend on the machine's cores."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # handwritten.py
torch.set_num_threads(1)
