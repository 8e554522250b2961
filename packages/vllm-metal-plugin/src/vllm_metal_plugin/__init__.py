"""vLLM platform plugin that runs models on MLX."""
