"""How fast, against what: measurements that anyone can repeat, each against its baselines in the same run on the same machine."""
