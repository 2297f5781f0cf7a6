"""Training loop, DeepSpeed engine, schedules, optimizers, rollback and alerts."""
