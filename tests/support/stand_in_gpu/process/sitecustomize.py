"""Gives every Python process whose PYTHONPATH names this folder the stand-in GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import stand_in_gpu

stand_in_gpu.install()
sys.path.pop(0)
