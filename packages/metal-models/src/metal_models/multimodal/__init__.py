"""Images, video and sound: mlx-vlm's towers beside mlx-lm's language models."""

from metal_models.multimodal.item import MultimodalItem
from metal_models.multimodal.load import TowerVerdict, has_towers, load_towers
from metal_models.multimodal.towers import Towers
from metal_models.row_inputs import RowEmbeddings

__all__ = ["MultimodalItem", "RowEmbeddings", "TowerVerdict", "Towers", "has_towers", "load_towers"]
