"""Configurations that transformers has no class for, or that its class refuses: read as mlx-lm reads them."""

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config.model import try_match_architecture_defaults
from vllm.model_executor.models import ModelRegistry
from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER as CONFIG_PARSERS
from vllm.transformers_utils.config import HFConfigParser

from vllm_metal_plugin.log import metal_logger

logger = metal_logger(__name__)

_MODEL = "MlxLm"
"""What the architecture's name starts with; what it ends with tells vLLM what the model is for."""

_NAMES = {
    "vocab_size": ("num_vocab",),
    "hidden_size": ("n_embd", "d_model", "hidden_dim", "model_dim"),
    "num_hidden_layers": ("num_layers", "n_layer", "n_layers", "num_transformer_layers"),
    "num_attention_heads": ("num_heads", "n_head", "n_heads", "num_query_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "num_attention_groups"),
    "head_dim": ("hidden_size_per_head", "kv_channels"),
    "max_position_embeddings": (
        "n_positions",
        "n_ctx",
        "max_sequence_length",
        "max_seq_len",
        "max_context_length",
        "model_max_length",
        "seq_length",
        "block_size",
    ),
}
"""What vLLM plans with -> names of the same in other configurations."""
_NEED_PROCESSORS = frozenset({"KimiK25ForConditionalGeneration", "KimiK3ForConditionalGeneration"})
"""Architectures that vLLM refuses where the image processor's files are missing, though text needs none."""
_PROCESSOR_FILE = "preprocessor_config.json"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


class PlainConfig(PreTrainedConfig):  # type: ignore[misc]
    """What vLLM must know of a model that it does not compute: sizes, special tokens and a dtype."""

    model_type = "mlx_lm"


class PlainConfigParser(HFConfigParser):  # type: ignore[misc]
    """vLLM's own parser, with ``PlainConfig`` for what it cannot read and mlx-lm can."""

    def parse(self, model: str | Path, trust_remote_code: bool, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Return ``config.json`` and an object of it."""
        try:
            values, config = super().parse(model, trust_remote_code=trust_remote_code, **kwargs)
        except Exception as error:
            raw = _served(Path(model))
            if raw is None:
                raise
            logger.info("Reading config.json as mlx-lm does: %s", str(error).splitlines()[0])
            return raw, plain_config(raw)
        named = bool(config.architectures)
        if named and _known(config) and not _lost_text(values, config) and not _lacks_processor(config, Path(model)):
            return values, config
        raw = _served(Path(model))
        if raw is None:
            return values, config
        generating = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        if not named and generating in ModelRegistry.get_supported_archs():
            config.architectures = [generating]
            return values, config
        return raw, plain_config(raw)


class PlainModel(nn.Module):  # type: ignore[misc]
    """Stands for a model that vLLM has no code for; the worker computes it on MLX."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        del vllm_config, prefix
        raise NotImplementedError("[load] expected MLX to compute this model, got a call of its torch stand-in.")

    def embed_input_ids(self, input_ids: Any) -> Any:
        """One of the methods by which vLLM knows a language model."""
        raise NotImplementedError

    def forward(self, input_ids: Any, positions: Any) -> Any:
        """One of the methods by which vLLM knows a language model."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: Any) -> Any:
        """The method by which vLLM knows a model that generates text."""
        raise NotImplementedError


def install() -> None:
    """Let vLLM read all configurations that mlx-lm reads; safe to repeat."""
    CONFIG_PARSERS["hf"] = PlainConfigParser
    ModelRegistry.register_model(f"{_MODEL}ForCausalLM", PlainModel)


def plain_config(raw: dict[str, Any]) -> PlainConfig:
    """Return what vLLM must know of a model's ``config.json``, with the defaults of mlx-lm's code."""
    from metal_models.registry import model_classes

    text = raw.get("text_config")
    levels = [text] if isinstance(text, dict) else []
    levels.append(raw)
    arguments = vars(model_classes(raw)[1].from_dict(raw))
    inner = arguments.get("text_config")
    levels += [inner if isinstance(inner, dict) else vars(inner)] if inner is not None else []
    levels.append(arguments)

    def find(*names: str) -> Any:
        found = (level[name] for level in levels for name in names if level.get(name) is not None)
        value = next(found, None)
        return max(value) if isinstance(value, list) and value and isinstance(value[0], int) else value

    sizes = {name: find(name, *others) for name, others in _NAMES.items()}
    sizes["num_attention_heads"] = sizes["num_attention_heads"] or 1
    config = PlainConfig(architectures=[_MODEL + _suffix(raw)], dtype=find("dtype", "torch_dtype"))
    # These are no arguments of transformers' class.
    for name, value in (sizes | {name: find(name) for name in _KEPT}).items():
        if value is not None:
            setattr(config, name, value)
    return config


def _suffix(raw: dict[str, Any]) -> str:
    """Return the end of an architecture's name that says what the model is for."""
    matched = try_match_architecture_defaults((raw.get("architectures") or [""])[0])
    return matched[0] if matched is not None and matched[1][0] == "pooling" else "ForCausalLM"


def _served(directory: Path) -> dict[str, Any] | None:
    """Return ``config.json`` if mlx-lm has a decoder for it."""
    from metal_models import MetalModelsError
    from metal_models.checkpoint import read_config
    from metal_models.encoders import is_encoder
    from metal_models.registry import model_classes

    try:
        raw: dict[str, Any] = read_config(directory)
        if is_encoder(raw):
            return None
        model_classes(raw)
    except (MetalModelsError, OSError):
        return None
    return raw


def _known(config: Any) -> bool:
    """Whether vLLM or transformers has code for one of the architectures."""
    supported = ModelRegistry.get_supported_archs()
    return any(
        name in supported or _base(name) in supported or hasattr(transformers, name) for name in config.architectures
    )


def _base(name: str) -> str:
    """Return the architecture whose pooling form ``name`` may be."""
    matched = try_match_architecture_defaults(name)
    return name if matched is None else f"{name.removesuffix(matched[0])}ForCausalLM"


def _lost_text(values: dict[str, Any], config: Any) -> bool:
    """Whether transformers' class of that name is of another model: without the language model's part."""
    return isinstance(values.get("text_config"), dict) and not isinstance(config.text_config, PreTrainedConfig)


def _lacks_processor(config: Any, directory: Path) -> bool:
    """Whether vLLM would look for a file in vain."""
    return not _NEED_PROCESSORS.isdisjoint(config.architectures or ()) and not (directory / _PROCESSOR_FILE).exists()
