"""Injects faults into real small runs and compares their ends with an undisturbed run."""
