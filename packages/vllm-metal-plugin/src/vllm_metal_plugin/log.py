"""Loggers that vLLM's logging configuration shows."""

from logging import Logger


def metal_logger(module_name: str) -> Logger:
    """A logger below vLLM's own, which is the only one that its configuration gives an output."""
    from vllm.logger import init_logger

    logger: Logger = init_logger(f"vllm.{module_name}")
    return logger
