"""LoRA adapters under vLLM: their references become local directories before an engine sees them.

Adapters are named in three places: on the command line, in a request to load one at run time, and as the model of a
request. None of them may reach a worker as a hub's id, because the worker would ask the hub for it.
"""

import asyncio
from typing import Any

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from vllm_metal_hub.errors import HubError, NotFoundError, OfflineError, UsageError
from vllm_metal_hub.model_ref import is_local, parse
from vllm_metal_hub.resolver import resolve
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.vllm_paths import local_path
from vllm_metal_plugin.errors import ModelFilesError

RESOLVER = "vllm-metal-hub"
_installed = False


def install() -> None:
    """Resolve adapters that are named at run time, in whatever front end; safe to repeat."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    LoRAResolverRegistry.register_resolver(RESOLVER, PulledAdapters())
    add_async, add, process_inputs = AsyncLLM.add_lora, LLMEngine.add_lora, InputProcessor.process_inputs

    async def add_lora_async(self: Any, lora_request: LoRARequest) -> bool:
        await asyncio.to_thread(make_local, lora_request)
        return bool(await add_async(self, lora_request))

    def add_lora(self: Any, lora_request: LoRARequest) -> bool:
        make_local(lora_request)
        return bool(add(self, lora_request))

    def process(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, LoRARequest):
                make_local(value)
        return process_inputs(self, *args, **kwargs)

    AsyncLLM.add_lora, LLMEngine.add_lora, InputProcessor.process_inputs = add_lora_async, add_lora, process


def make_local(lora_request: LoRARequest) -> None:
    """Replace the reference in a request by a local directory; a path stays.

    Raises:
        LoRAAdapterNotFoundError: what vLLM answers with 404.
        ModelFilesError: another reason, in words for the user.
    """
    if is_local(lora_request.lora_path):
        return
    try:
        lora_request.lora_path = local_path(lora_request.lora_path, None) or lora_request.lora_path
    except ModelFilesError as error:
        if isinstance(error.__cause__, NotFoundError | OfflineError | UsageError):
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path) from error
        raise


class PulledAdapters(LoRAResolver):  # type: ignore[misc]
    """Finds an adapter that a request names as its model, among those that were pulled before.

    It never uses the network: otherwise whoever may send requests could make the server download anything.
    """

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter that was pulled as ``lora_name``, or None."""
        return await asyncio.to_thread(self._find, lora_name)

    def _find(self, lora_name: str) -> LoRARequest | None:
        try:
            if parse(lora_name).path is not None:
                return None
            found = resolve(lora_name, offline=True, settings=HubSettings.from_env())
        except HubError:
            return None
        if not (found.path / "adapter_config.json").is_file():
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(found.path))
