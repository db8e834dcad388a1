"""What you need to test and time your own operators."""

from __future__ import annotations
