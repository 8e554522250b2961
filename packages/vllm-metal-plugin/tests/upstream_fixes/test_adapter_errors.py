import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

from vllm_metal_plugin.upstream_fixes import install_in_front_end


def load(message: str) -> Any:
    """What a client gets whose adapter a worker refuses with ``message``."""

    async def add_lora(request: Any) -> bool:
        raise RuntimeError(f"Call to add_lora method failed: {message}")

    nothing = dict.fromkeys(("model_config", "renderer", "input_processor", "io_processor"))
    models = OpenAIServingModels(SimpleNamespace(add_lora=add_lora, **nothing), [BaseModelPath("tiny", "tiny")])
    asked = LoadLoRAAdapterRequest(lora_name="a", lora_path=str(Path.cwd()))
    return asyncio.run(models.load_lora_adapter(asked)).error


def test_adapter_that_does_not_fit_is_the_clients_fault() -> None:
    install_in_front_end()
    error = load("[lora] expected a rank of at most 8, got 16. Raise --max-lora-rank.")
    assert (error.code, error.type) == (400, "BadRequestError")
    assert error.message.startswith("[lora] expected a rank of at most 8")


def test_other_failures_are_the_servers() -> None:
    install_in_front_end()
    assert load("out of memory").code == 500
