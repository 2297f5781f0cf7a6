"""Weights for the rest of the world: what timm, Hugging Face, open_clip and ONNX Runtime load without a script of ours.

:func:`pipeline.export.networks.read` takes the networks out of a checkpoint, :func:`pipeline.export.write.write` puts them into a
folder in one of the layouts of :data:`pipeline.export.write.TARGETS`.
"""
