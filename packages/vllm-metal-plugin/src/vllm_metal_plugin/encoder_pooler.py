"""vLLM's poolers over an encoder's hidden rows, with the heads of its checkpoint; torch on the CPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import gelu, layer_norm, linear
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.pooler import BgeM3Pooler, BOSEOSFilter, DispatchPooler, Pooler
from vllm.model_executor.layers.pooler.seqwise import get_seq_pooling_method, pooler_for_embed
from vllm.model_executor.layers.pooler.tokwise import AllPool, pooler_for_token_classify, pooler_for_token_embed

from metal_models import EncoderModel
from metal_models.torch_bridge import to_torch
from vllm_metal_plugin.errors import ModelFilesError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

Head = Callable[[torch.Tensor], torch.Tensor]


class _Heads:
    """Functions of hidden rows that the tensors of a checkpoint's heads stand for, in the dtype of vLLM's heads."""

    def __init__(self, config: "ModelConfig", model: EncoderModel) -> None:
        self.config = config
        self._tensors = {name: to_torch(array).to(config.head_dtype, copy=True) for name, array in model.heads.items()}

    def linear(self, name: str) -> Head:
        """Return the linear layer ``name``."""
        weight, bias = self._tensor(f"{name}.weight"), self._tensors.get(f"{name}.bias")
        return lambda rows: linear(rows.to(weight.dtype), weight, bias)

    def norm(self, name: str, eps: float) -> Head:
        """Return the layer norm ``name``."""
        weight, bias = self._tensor(f"{name}.weight"), self._tensors.get(f"{name}.bias")
        return lambda rows: layer_norm(rows, weight.shape, weight, bias, eps)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise ModelFilesError(
                f"[pooling] expected a tensor {name} in {self.config.model}, which is of the architecture "
                f"{self.config.architecture}, got none. Use a checkpoint that was trained for this."
            )
        return self._tensors[name]


def build_encoder_pooler(vllm_config: "VllmConfig", model: EncoderModel) -> Pooler:
    """Return what vLLM's own model of that architecture has on top of its encoder.

    Raises:
        ModelFilesError: The checkpoint lacks a tensor of the head.
    """
    config = vllm_config.model_config
    heads = _Heads(config, model)
    with set_current_vllm_config(vllm_config):
        pooler: Pooler = _POOLERS[config.architecture](heads)
    return pooler


def _in_order(*steps: Head) -> Head:
    """Return the functions applied one after the other."""

    def apply(rows: torch.Tensor) -> torch.Tensor:
        for step in steps:
            rows = step(rows)
        return rows

    return apply


def _embedding(heads: _Heads) -> Any:
    return DispatchPooler.for_embedding(heads.config.pooler_config)


def _bge_m3(heads: _Heads) -> Any:
    """Dense, sparse (a weight for each token) and multi-vector embeddings; the first token is in neither of these."""
    pooler_config, hf_config = heads.config.pooler_config, heads.config.hf_config
    dense = pooler_for_embed(pooler_config)
    sparse = BOSEOSFilter(
        pooler_for_token_classify(
            pooler_config, pooling=AllPool(), classifier=heads.linear("sparse_linear"), act_fn=torch.relu
        ),
        hf_config.bos_token_id,
        hf_config.eos_token_id,
    )
    vectors = BOSEOSFilter(
        pooler_for_token_embed(pooler_config, heads.linear("colbert_linear")), hf_config.bos_token_id
    )
    return DispatchPooler(
        {
            "embed": dense,
            "token_embed": vectors,
            "token_classify": sparse,
            "embed&token_classify": BgeM3Pooler(sparse, dense),
        }
    )


def _roberta_labels(heads: _Heads) -> Any:
    classifier = _in_order(heads.linear("classifier.dense"), torch.tanh, heads.linear("classifier.out_proj"))
    return DispatchPooler.for_seq_cls(heads.config.pooler_config, classifier=classifier)


def _bert_labels(heads: _Heads) -> Any:
    config = heads.config.pooler_config
    pooling = _projected(config.seq_pooling_type, _in_order(heads.linear("pooler.dense"), torch.tanh))
    return DispatchPooler.for_seq_cls(config, pooling=pooling, classifier=heads.linear("classifier"))


def _modernbert_labels(heads: _Heads) -> Any:
    # As in vLLM, the checkpoint and not the user says what is pooled.
    pooling = _projected(heads.config.hf_config.classifier_pooling.upper(), _modernbert_head(heads))
    return DispatchPooler.for_seq_cls(
        heads.config.pooler_config, pooling=pooling, classifier=heads.linear("classifier")
    )


def _modernbert_head(heads: _Heads) -> Head:
    return _in_order(heads.linear("head.dense"), gelu, heads.norm("head.norm", heads.config.hf_config.norm_eps))


def _projected(pooling_type: str, projection: Head) -> Any:
    """Return a pooling of sequences whose result is projected."""
    method = get_seq_pooling_method(pooling_type)
    return lambda rows, metadata: projection(method(rows, metadata))


def _token_labels(heads: _Heads) -> Any:
    return pooler_for_token_classify(heads.config.pooler_config, classifier=heads.linear("classifier"))


def _modernbert_token_labels(heads: _Heads) -> Any:
    classifier = _in_order(_modernbert_head(heads), heads.linear("classifier"))
    return pooler_for_token_classify(heads.config.pooler_config, classifier=classifier)


_POOLERS: dict[str, Callable[[_Heads], Any]] = {
    "BertForSequenceClassification": _bert_labels,
    "BertForTokenClassification": _token_labels,
    "BertModel": _embedding,
    "BgeM3EmbeddingModel": _bge_m3,
    "ModernBertForSequenceClassification": _modernbert_labels,
    "ModernBertForTokenClassification": _modernbert_token_labels,
    "ModernBertModel": _embedding,
    "RobertaForMaskedLM": _embedding,
    "RobertaForSequenceClassification": _roberta_labels,
    "RobertaForTokenClassification": _token_labels,
    "RobertaModel": _embedding,
    "XLMRobertaForSequenceClassification": _roberta_labels,
    "XLMRobertaForTokenClassification": _token_labels,
    "XLMRobertaModel": _embedding,
}
