"""Checks that fovea works on a machine: ten stages, each in a process of its own (``fovea prove``)."""
