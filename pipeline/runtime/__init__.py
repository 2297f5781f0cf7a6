"""Runtime of a rank: process group, run directory, watchdog, failure reports, stop requests."""
