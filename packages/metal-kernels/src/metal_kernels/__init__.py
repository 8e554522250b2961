"""GPU functions on mx.array for serving LLMs: paged attention, cache writes and their plain-MLX twins."""
