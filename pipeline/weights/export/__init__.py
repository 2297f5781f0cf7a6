"""Exports weights: what timm, Hugging Face, open_clip and ONNX Runtime load without a script of ours.

:mod:`~pipeline.weights.export.networks` takes the networks out of a checkpoint, :mod:`~pipeline.weights.export.write` puts them
into a folder in one of its layouts.
"""
