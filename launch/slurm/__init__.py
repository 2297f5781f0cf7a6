"""Runs on a Slurm cluster: submission, and supervision through preemption, crashes and node failures until the run is finished.

The modules that run in the batch step (``supervisor`` and what it imports, ``preflight``, ``pipeline.runtime.job_record``) need
only the standard library: the batch script's node may have a bare Python while the training runs in a container.
"""
