"""The process group, the run directory, and how processes end: watchdog, first failure, stop requests."""
