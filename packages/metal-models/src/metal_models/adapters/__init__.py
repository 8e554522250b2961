"""Model classes of families whose attention does not go through mlx-lm's shared function."""
