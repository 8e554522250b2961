"""vLLM 0.32 asks XLM-RoBERTa's configuration for ``position_embedding_type``, which transformers 5 no longer has.

A checkpoint that transformers 5 wrote lacks the value, and the launch ends with an AttributeError. It can go when
``JinaRobertaModelConfig`` in ``vllm.model_executor.models.config`` asks with a default.
"""


def install() -> None:
    """Give configurations without one the value that they mean; safe to repeat."""
    from transformers import XLMRobertaConfig

    if not hasattr(XLMRobertaConfig, "position_embedding_type"):
        XLMRobertaConfig.position_embedding_type = "absolute"
