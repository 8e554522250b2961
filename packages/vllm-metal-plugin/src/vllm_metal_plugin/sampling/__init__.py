"""From logits to tokens: vLLM's sampling rules on lazy MLX arrays.

A step is three lines for the runner::

    out = sampler(logits, rows, state, grammar)          # lazy; state already includes the new tokens
    mx.async_eval(out.arrays(), state.arrays(), ...)     # the only evaluation
    lists = out.logprob_lists(output_index, num_reqs)  # later, on the host
"""

from vllm_metal_plugin.sampling.logprobs import PromptLogprobs, SampleLogprobs, join_logprobs
from vllm_metal_plugin.sampling.sampler import SampledTokens, Sampler, SamplerOutput
from vllm_metal_plugin.sampling.sampling_state import SamplingState
from vllm_metal_plugin.sampling.structured_output import GrammarRows

__all__ = [
    "GrammarRows",
    "PromptLogprobs",
    "SampleLogprobs",
    "SampledTokens",
    "Sampler",
    "SamplerOutput",
    "SamplingState",
    "join_logprobs",
]
