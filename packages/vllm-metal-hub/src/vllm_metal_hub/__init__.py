"""The vllm-metal command line, and one local snapshot per launch."""
