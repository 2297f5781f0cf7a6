"""Evaluators: k-NN, linear probes, segmentation, zero-shot, retrieval, robustness.

The tests compare the metrics with those of torchmetrics. It is not used here: importing any part of it imports all of it, with
transformers and matplotlib (3 s of ``time.process_time`` in addition to torch, timm and scikit-learn, on every rank), for counts
that take one line each and are summed over our own process groups.
"""
