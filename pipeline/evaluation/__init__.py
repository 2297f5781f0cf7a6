"""What the weights are worth.

The tests compare our metrics with torchmetrics'. It is not used here: importing any part of it imports all, transformers and
matplotlib among it (3 s of ``time.process_time`` behind torch, timm and scikit-learn, on every rank), for counts that are a line
each and are summed over groups of ranks of our own.
"""
