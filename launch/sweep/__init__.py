"""Many runs of one config with different settings, as one directory."""
