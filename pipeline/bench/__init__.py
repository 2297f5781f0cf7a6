"""How fast, against what: measurements that anyone can repeat, each against its rivals in the same run on the same machine."""
