"""Data loading: reads samples in worker processes and streams batches to the device."""
