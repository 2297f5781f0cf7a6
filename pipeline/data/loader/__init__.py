"""The loader: reads samples, in worker processes, and streams batches."""
