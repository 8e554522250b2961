"""vLLM's poolers over a model's hidden rows: method, projection or classifier, activation; torch on the CPU."""

from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.pooler import DispatchPooler, Pooler

from metal_models import PagedModel
from metal_models.torch_bridge import to_torch
from vllm_metal_plugin.errors import ModelFilesError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

TWO_WAY = "from_2_way_softmax"
"""vLLM's name for a score that is the logit of one token less that of another."""


def build_pooler(vllm_config: "VllmConfig", model: PagedModel) -> Pooler:
    """Return what vLLM would attach to the model for the tasks that it converts it to.

    Raises:
        ModelFilesError: A model that classifies has no score head.
    """
    config = vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        if config.convert_type == "classify":
            return DispatchPooler.for_seq_cls(config.pooler_config, classifier=_classifier(config, model))
        return DispatchPooler.for_embedding(config.pooler_config)


def _classifier(config: "ModelConfig", model: PagedModel) -> Any:
    """Return the linear map from pooled rows to the logits of labels, in the dtype of vLLM's heads."""
    tokens = _setting(config, "classifier_from_token")
    if tokens:
        weight, bias = _token_rows(config, model, tokens), None
    elif (score := model.module.get("score")) is not None:
        weight, bias = score.weight, score.get("bias")
    else:
        raise ModelFilesError(
            f"[pooling] expected a tensor score.weight in {config.model}, got none. Use a sequence-classification "
            "checkpoint, or name the tokens of the answers: --hf-overrides "
            """'{"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}'."""
        )
    # Copies: the head outlives nothing of the model, and is tiny.
    parameters = {name: to_torch(array).to(config.head_dtype, copy=True) for name, array in _given(weight, bias)}
    return partial(torch.nn.functional.linear, **parameters)


def _given(weight: mx.array, bias: mx.array | None) -> list[tuple[str, mx.array]]:
    return [("weight", weight)] + ([] if bias is None else [("bias", bias)])


def _token_rows(config: "ModelConfig", model: PagedModel, tokens: list[str]) -> mx.array:
    """Return the rows of the vocabulary head that stand for labels."""
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(
        config.tokenizer,
        revision=config.tokenizer_revision,
        tokenizer_mode=config.tokenizer_mode,
        trust_remote_code=config.trust_remote_code,
    )
    ids = tokenizer.convert_tokens_to_ids(tokens)
    rows = model.head_rows(mx.array(ids, mx.int32)).astype(mx.float32)
    return rows[1:] - rows[:1] if _setting(config, "method") == TWO_WAY else rows


def _setting(config: "ModelConfig", name: str) -> Any:
    """Return a setting that may stand at the top of ``config.json`` or in its text part."""
    top = config.hf_config
    return getattr(top, name, None) or getattr(top.get_text_config(), name, None)
