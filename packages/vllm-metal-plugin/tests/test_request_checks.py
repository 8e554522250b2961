import numpy as np
import pytest
import torch
from vllm import PoolingParams, SamplingParams
from vllm.exceptions import VLLMClientError

from vllm_metal_plugin.request_checks import MAX_N, UnsupportedRequestError, check_request

TOKENS = {"type": "token", "prompt_token_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(n=MAX_N, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=1),
        SamplingParams(logprobs=5, prompt_logprobs=2),
        SamplingParams(logit_bias={1: 2.0}, allowed_token_ids=[1, 2], min_tokens=2, presence_penalty=0.5),
    ],
)
def test_accepts(params: SamplingParams) -> None:
    check_request(TOKENS, params)


@pytest.mark.parametrize(
    ("params", "word"),
    [
        (SamplingParams(n=MAX_N + 1), "n of at most"),
        (SamplingParams(extra_args={"knob": 1}), "knob"),
        (SamplingParams(extra_args={"kv_transfer_params": {"do_remote_decode": True}}), "kv_transfer_params"),
        (SamplingParams(trace_decode_token_ids=[1, 2]), "trace_decode_token_ids"),
        (SamplingParams(prompt_logprob_token_ids=np.array([[1]])), "prompt_logprob_token_ids"),
    ],
)
def test_refuses_parameters(params: SamplingParams | PoolingParams, word: str) -> None:
    with pytest.raises(ValueError, match=word) as error:
        check_request(TOKENS, params)
    assert isinstance(error.value, VLLMClientError)


@pytest.mark.parametrize("token_ids", [[1, -1], [10]])
def test_refuses_tokens_outside_the_vocabulary(token_ids: list[int]) -> None:
    check_request({"type": "token", "prompt_token_ids": [0, 9]}, SamplingParams(), 10)
    with pytest.raises(UnsupportedRequestError, match="from 0 to 9"):
        check_request({"type": "token", "prompt_token_ids": token_ids}, SamplingParams(), 10)


@pytest.mark.parametrize(
    "inputs",
    [
        {"type": "embeds", "prompt_embeds": torch.zeros(2, 4)},
        {"type": "enc_dec"},
    ],
)
def test_refuses_prompts_that_are_no_tokens(inputs: dict[str, object]) -> None:
    with pytest.raises(UnsupportedRequestError, match=str(inputs["type"])):
        check_request(inputs, SamplingParams())


def test_takes_prompts_with_images_within_the_vocabulary() -> None:
    check_request({"type": "multimodal", "prompt_token_ids": [1, 9], "mm_kwargs": {}}, SamplingParams(), 10)
    with pytest.raises(UnsupportedRequestError, match="from 0 to 8"):
        check_request({"type": "multimodal", "prompt_token_ids": [1, 9], "mm_kwargs": {}}, SamplingParams(), 9)


def test_salt_travels_with_the_parameters_and_does_not_stay() -> None:
    params = SamplingParams()
    check_request({**TOKENS, "cache_salt": "a"}, params)
    assert params.extra_args == {"cache_salt": "a"}
    check_request({**TOKENS, "cache_salt": "b"}, params)
    assert params.extra_args == {"cache_salt": "b"}
    check_request(TOKENS, params)
    assert not params.extra_args
