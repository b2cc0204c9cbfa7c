"""Data: a file in any usual format becomes rows, rows become tokens and labels, and these flat batches.

    file --formats--> Row --template--> Example (tokens, labels) --batches--> FlatBatch

Only batches.py imports torch.
"""
