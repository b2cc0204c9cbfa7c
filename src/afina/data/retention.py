"""The built-in general text: English and Spanish prose that no base of ours has learned from."""

from pathlib import Path

RETENTION_TEXT = Path(__file__).parent / "retention.txt"
