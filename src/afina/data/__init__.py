"""Data: a file in any usual format becomes rows, rows become token ids, and these packed batches.

    file --readers--> records --schema--> rows --renderer--> Example --packing--> PackedBatch

Only packing.py imports torch.
"""

from pathlib import Path

RETENTION_TEXT = Path(__file__).parent / "retention.txt"
"""The built-in retention text: English and Spanish prose outside the bases' training data."""
