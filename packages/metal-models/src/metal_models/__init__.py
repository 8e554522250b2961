"""mlx-lm's models over a paged KV cache: ragged batches, GGUF and safetensors loading."""
