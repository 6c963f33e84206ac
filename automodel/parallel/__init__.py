"""Placing a model on a device mesh: FSDP2, expert parallelism, parameter loading, and the one gradient norm."""
