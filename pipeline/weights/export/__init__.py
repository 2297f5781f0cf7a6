"""Exports weights in formats that timm, Hugging Face, open_clip and ONNX Runtime load without custom code.

:mod:`~pipeline.weights.export.networks` extracts the networks from a checkpoint; :mod:`~pipeline.weights.export.write` writes
them to a folder in one of the layouts.
"""
