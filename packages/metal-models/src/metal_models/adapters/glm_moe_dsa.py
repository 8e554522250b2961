"""GLM with DeepSeek's sparse attention."""

from mlx_lm.models import glm_moe_dsa
from mlx_lm.models.glm_moe_dsa import ModelArgs

from metal_models.adapters.deepseek_v32 import Attention

__all__ = ["Model", "ModelArgs"]


class Model(glm_moe_dsa.Model):
    """mlx-lm's model with the attention of DeepSeek-V3.2; parameters have the same names."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn = Attention(config)
