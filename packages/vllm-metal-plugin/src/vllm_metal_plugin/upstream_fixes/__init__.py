"""Workarounds for vLLM behaviour, one file each: what goes wrong, in which versions, and when it can go."""


def install() -> None:
    """Install every workaround; safe to repeat."""
    from vllm_metal_plugin.upstream_fixes import accelerator_empty_cache, failed_steps

    accelerator_empty_cache.install()
    failed_steps.install()
