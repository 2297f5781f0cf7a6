"""Runs on a Slurm cluster: submitted once, attended through preemption, crashes and lost nodes until they are finished.

What runs beside the job (``attend``, ``decide``, ``record``, ``tools``) needs the standard library only: a batch script's machine
may have a bare Python while the training lives in a container.
"""
