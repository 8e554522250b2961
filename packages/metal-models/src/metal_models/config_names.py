"""Gives mlx-lm's model files the values that transformers 5 keeps elsewhere in a config."""

from functools import cache
from typing import Any

# model_type -> kinds of layers by transformers' names, and by those that mlx-lm's file knows.
_KINDS = {"granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"}}


def reading_new_names(args_class: Any) -> Any:
    """Return a model's arguments class that also understands configs written by transformers 5.

    Many of mlx-lm's files look for ``rope_theta`` and fall back to a number of their own, silently, where a config has
    ``rope_parameters`` instead.
    """
    return _reading(args_class)


@cache
def _reading(args_class: Any) -> Any:
    def from_dict(cls: Any, params: dict[str, Any]) -> Any:
        return args_class.from_dict.__func__(cls, with_old_names(params))

    return type(
        args_class.__name__, (args_class,), {"from_dict": classmethod(from_dict), "__module__": args_class.__module__}
    )


def with_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` in which values have the names and forms that they had before transformers 5."""
    config = {name: _number(value) for name, value in config.items()}
    named = _named(config)
    if (kinds := _KINDS.get(str(config.get("model_type")))) and config.get("layer_types"):
        named["layer_types"] = [kinds.get(kind, kind) for kind in config["layer_types"]]
    if isinstance(config.get("text_config"), dict):
        named["text_config"] = _named(config["text_config"])
    return named


def _named(config: dict[str, Any]) -> dict[str, Any]:
    found = _rope(config.get("rope_parameters")) | _full_layers(config)
    found["num_experts"] = config.get("num_local_experts")
    missing = {name: value for name, value in found.items() if value is not None and config.get(name) is None}
    unscaled = {"rope_scaling": None} if config.get("rope_parameters") else {}  # some files ask for it
    return {**unscaled, **config, **missing}


def _number(value: Any) -> Any:
    """Return numbers for what stands for those that JSON does not have, also in a list: ``{"__float__": …}``."""
    if isinstance(value, list):
        return [_number(part) for part in value]
    return float(value["__float__"]) if isinstance(value, dict) and value.keys() == {"__float__"} else value


def _rope(rope: Any) -> dict[str, Any]:
    """Return the old names of ``rope_parameters``."""
    if not isinstance(rope, dict):
        return {}
    found: dict[str, Any] = {}
    local = rope.get("sliding_attention")
    if isinstance(local, dict):  # by kind of layer
        found["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope.get("full_attention") or {}
    found["rope_theta"] = rope.get("rope_theta")
    found["rotary_emb_base"] = found["rope_theta"]
    found["partial_rotary_factor"] = found["rotary_pct"] = rope.get("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {"type": rope["rope_type"], **rope}
    return found


def _full_layers(config: dict[str, Any]) -> dict[str, Any]:
    """Return the old names of what ``per_layer_config`` says of layers without a window."""
    if not isinstance(config.get("per_layer_config"), dict):
        return {}
    kinds = config.get("layer_types") or []
    own = (values for index, values in config["per_layer_config"].items() if kinds[int(index)] == "full_attention")
    full = {"head_dim": config.get("head_dim"), **next(own, {})}
    return {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full.get("num_key_value_heads")}
