"""The built-in general text: English and Spanish prose that no base of ours has learned from."""

from pathlib import Path

GENERAL = Path(__file__).parent / "general.txt"
