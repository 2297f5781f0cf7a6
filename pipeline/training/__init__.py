"""Training: the order of one step, DeepSpeed behind one engine, schedules, optimizers, alerts."""
