"""Tests import what lies beside them, such as handwritten.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
