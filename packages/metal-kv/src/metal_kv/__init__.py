"""KV-cache memory for MLX: specs, layouts, pools, block tables and a memory budget."""
