"""What a configuration costs before it runs: memory, operations, activations."""
