"""GLM-4.5V: the tower of GLM-4.1V before a language model of experts."""

from typing import Any

from metal_models.multimodal.families import glm4v


class Family(glm4v.Family):
    """GLM-4.5V's vision tower."""

    package = "glm4v_moe"

    @classmethod
    def vlm_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config of the tower alone, and one expert of least size."""
        made = super().vlm_config(config)
        experts = {
            "moe_intermediate_size": 8, "n_routed_experts": 1, "num_experts_per_tok": 1, "n_shared_experts": 1,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
            "first_k_dense_replace": 0, "use_qk_norm": False, "attention_bias": False, "partial_rotary_factor": 1.0,
        }  # fmt: skip
        return made | {"text_config": made["text_config"] | experts}
