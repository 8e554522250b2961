"""Workarounds for vLLM behaviour, one file each: what goes wrong, in which versions, and when it can go."""


def install() -> None:
    """Install the workarounds that every process needs; safe to repeat."""
    from vllm_metal_plugin.upstream_fixes import accelerator_empty_cache, open_connections_at_shutdown

    accelerator_empty_cache.install()
    open_connections_at_shutdown.install()


def install_in_front_end() -> None:
    """Install the workarounds that only the process that takes requests needs; safe to repeat."""
    from vllm_metal_plugin.upstream_fixes import (
        adapter_errors,
        failed_starts,
        failed_steps,
        media_errors,
        model_inspection,
        roberta_position_kind,
    )  # fmt: skip

    adapter_errors.install()
    failed_starts.install()
    failed_steps.install_in_front_end()
    media_errors.install()
    model_inspection.install()
    roberta_position_kind.install()


def install_in_engine_core() -> None:
    """Install the workarounds that only the process with the scheduler needs; safe to repeat."""
    from vllm_metal_plugin.upstream_fixes import covered_items, failed_steps, whole_items

    covered_items.install()
    failed_steps.install()
    whole_items.install()
