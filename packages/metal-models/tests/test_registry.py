"""Which architectures run, and why the others do not."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from metal_models import MetalModelsError, PagedModel, UnsupportedModelError, supported
from metal_models.registry import build, layer_specs, model_classes

REFUSED = [
    ("deepseek_v41", "needs a cache of its own kind"),
    ("muse_spark", "a kernel that exists for Metal only"),
    ("phi3small", "lets a token of its block-sparse layers see later ones"),
]


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt_oss", "gemma4", "qwen3_vl", "qwen3_next", "rwkv7", "falcon_h1"]
)
def test_supported(family: str, lab: SimpleNamespace) -> None:
    supported(lab.read_config(family))


def test_layer_specs_need_no_weights(lab: SimpleNamespace) -> None:
    config = lab.read_config("qwen3_next")
    assert layer_specs(config, 8) == PagedModel(build(config), config).kv_cache_specs(8)


@pytest.mark.parametrize(("family", "reason"), REFUSED)
def test_refused_with_the_reason(family: str, reason: str, lab: SimpleNamespace) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        supported(lab.read_config(family))
    assert caught.value.architecture == family
    assert repr(family) in str(caught.value)


def test_options_that_mlx_lm_does_not_have(lab: SimpleNamespace) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'nanbeige': mlx-lm says .*not yet supported"):
        supported(lab.read_config("nanbeige") | {"num_loops": 2, "loop_share_kv": True})


def test_unknown_architecture() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt_17'.*no model of that type"):
        supported({"model_type": "gpt_17"})


@pytest.mark.parametrize("config", [{}, {"model_type": ""}, {"model_type": None}])
def test_config_without_architecture(config: dict[str, Any]) -> None:
    with pytest.raises(MetalModelsError, match="expected a model_type"):
        supported(config)


def test_incomplete_config_names_what_it_lacks() -> None:
    with pytest.raises(MetalModelsError, match="hidden_size"):
        supported({"model_type": "llama"})


def test_mlx_lms_names_for_other_architectures() -> None:
    model_class, args_class = model_classes({"model_type": "mistral"})
    assert model_class is llama.Model
    assert issubclass(args_class, llama.ModelArgs)


def test_large_models_are_checked_without_memory(lab: SimpleNamespace) -> None:
    before = mx.get_active_memory()
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "num_attention_heads": 128, "vocab_size": 200000}
    config = lab.read_config("llama") | sizes
    supported(config)
    build(config)
    assert mx.get_active_memory() - before < 50_000_000
