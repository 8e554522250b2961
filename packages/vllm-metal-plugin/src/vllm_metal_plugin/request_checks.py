"""What the plugin refuses of a single request, before it reaches the engine."""

from typing import Any

from vllm.exceptions import VLLMClientError

from vllm_metal_plugin.errors import VllmMetalPluginError

MAX_N = 256
SALT = "cache_salt"
"""Key of ``SamplingParams.extra_args`` under which a request's salt travels to the worker, which vLLM sends none."""


class UnsupportedRequestError(VllmMetalPluginError, VLLMClientError, ValueError):  # type: ignore[misc]
    """One request asks for something unsupported.

    vLLM's server turns client errors, and no others, into HTTP 400 with their text.
    """


def check_request(processed_inputs: Any, params: Any, vocab_size: int | None = None) -> None:
    """Raise when the runner could not compute the request.

    This is the only gate: past it, an exception would reach requests that share its step.

    Args:
        processed_inputs: vLLM's ``EngineInput``, a dictionary whose ``type`` says what the prompt is.
        params: ``SamplingParams`` or ``PoolingParams``.
        vocab_size: Rows of the model's embedding, None when no model is configured.

    Raises:
        UnsupportedRequestError: Names the parameter; vLLM answers HTTP 400 with the text.
    """
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams

    kind = processed_inputs.get("type", "enc_dec") if isinstance(processed_inputs, dict) else "unknown"
    if kind not in ("token", "multimodal"):
        _refuse("a text, token or multimodal prompt", f"a prompt of type {kind!r}", "Send text or token ids.")
    if isinstance(params, SamplingParams):
        _check_sampling(params)
        _pass_salt_on(params, processed_inputs.get("cache_salt"))
    elif not isinstance(params, PoolingParams):
        _refuse("sampling or pooling parameters", type(params).__name__, "Send one of the two.")
    token_ids = processed_inputs["prompt_token_ids"]
    if token_ids and vocab_size is not None and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        _refuse(
            f"prompt token ids from 0 to {vocab_size - 1}",
            f"ids from {min(token_ids)} to {max(token_ids)}",
            "Tokenise with this model's tokenizer.",
        )


def _pass_salt_on(params: Any, cache_salt: str | None) -> None:
    """Set or remove the salt; parameters may have been used before, with another prompt."""
    others = {name: value for name, value in (params.extra_args or {}).items() if name != SALT}
    if cache_salt or len(others) < len(params.extra_args or {}):
        params.extra_args = {**others, SALT: cache_salt} if cache_salt else others or None


def _check_sampling(params: Any) -> None:
    if params.n > MAX_N:
        _refuse(f"n of at most {MAX_N}", str(params.n), "Send several requests.")
    if params.prompt_logprob_token_ids is not None:
        _refuse("no prompt_logprob_token_ids", "a list", "Use prompt_logprobs.")
    if params.trace_decode_token_ids is not None:
        _refuse("no trace_decode_token_ids", "a list", "Send the text as part of the prompt.")
    if params.thinking_token_budget is not None:
        _refuse("no thinking_token_budget", str(params.thinking_token_budget), "Use max_tokens.")
    if params.extra_args:
        unknown = sorted(set(params.extra_args) - {"kv_transfer_params", SALT})
        if unknown:
            _refuse("no extra arguments (vllm_xargs)", ", ".join(unknown), "Drop them: nothing here reads them.")
        if params.extra_args.get("kv_transfer_params"):
            _refuse("no kv_transfer_params", "some", "This server transfers no KV cache.")


def _refuse(expected: str, got: str, remedy: str) -> None:
    raise UnsupportedRequestError(f"[request] expected {expected}, got {got}. {remedy}")
