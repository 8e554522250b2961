import os
import subprocess
import sys

import pytest
import torch

from vllm_metal_plugin.platform import WORKER_CLS, MetalPlatform


@pytest.fixture
def vllm_config(model_dir, monkeypatch):  # type: ignore[no-untyped-def]
    from vllm.engine.arg_utils import EngineArgs

    for name in ("VLLM_METAL_BLOCK_SIZE", "VLLM_METAL_PREFIX_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def build(**options):  # type: ignore[no-untyped-def]
        return EngineArgs(model=str(model_dir), **options).create_engine_config()

    return build


def test_vllm_picks_the_platform() -> None:
    from vllm.platforms import current_platform

    assert isinstance(current_platform, MetalPlatform)
    assert current_platform.is_out_of_tree()


def test_options_that_vllm_refuses_are_one_sentence(vllm_config) -> None:
    from vllm_metal_plugin.errors import UnsupportedConfigError

    with pytest.raises(UnsupportedConfigError, match=r"^\[config\] vLLM refuses these options: Sleep mode"):
        vllm_config(enable_sleep_mode=True)


def test_registration_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_metal_plugin as p; name = p.register_platform(); "
        "assert name == 'vllm_metal_plugin.platform.MetalPlatform', name; "
        "assert not {'mlx.core', 'torch', 'vllm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_platform_steps_aside_without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_metal_plugin import register_platform

    monkeypatch.setenv("VLLM_METAL_USE_MLX", "0")
    assert register_platform() is None


def test_bad_variable_ends_the_launch_with_one_sentence() -> None:
    code = "import vllm_metal_plugin as p; assert p.register_platform(); p.register_general()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_METAL_MEMORY_FRACTION": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: [environment] expected VLLM_METAL_MEMORY_FRACTION")
    assert "Traceback" not in run.stderr


def test_device_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = MetalPlatform()
    assert platform.get_device_total_memory() > 1 << 28
    assert platform.get_device_name()
    assert platform.support_hybrid_kv_cache()
    assert not platform.is_pin_memory_available()
    assert platform.set_device(torch.device("cpu")) is None
    assert platform.manual_seed_all(1) is None


@pytest.mark.parametrize(
    ("text", "limits"),
    [("image=0,audio=2", {"image": 0, "audio": 2}), ('{"image": {"count": 1}}', {"image": {"count": 1}})],
)
def test_limits_of_items_have_a_short_form(text: str, limits: object) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--limit-mm-per-prompt", text]).limit_mm_per_prompt == limits


def test_cpu_computes_in_float32() -> None:
    from metal_kernels import target

    expected = [torch.float32] if target() == "cpu" else [torch.bfloat16, torch.float16, torch.float32]
    assert MetalPlatform().supported_dtypes == expected


def test_config_points_at_the_worker_and_stays_so(vllm_config) -> None:  # type: ignore[no-untyped-def]
    config = vllm_config()
    assert config.parallel_config.worker_cls == WORKER_CLS
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert config.scheduler_config.async_scheduling
    assert config.scheduler_config.max_num_seqs <= 512
    config.cache_config.block_size = 48
    MetalPlatform.check_and_update_config(config)
    assert config.cache_config.block_size == 48


def test_block_size_from_the_environment_and_from_the_option(  # type: ignore[no-untyped-def]
    vllm_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_METAL_BLOCK_SIZE", "32")
    assert vllm_config().cache_config.block_size == 32
    assert vllm_config(block_size=8).cache_config.block_size == 8


def test_prefix_cache_from_the_environment(  # type: ignore[no-untyped-def]
    vllm_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vllm_config().cache_config.enable_prefix_caching
    monkeypatch.setenv("VLLM_METAL_PREFIX_CACHE", "0")
    assert not vllm_config().cache_config.enable_prefix_caching


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "--tensor-parallel-size"),
        ({"enable_lora": True, "lora_target_modules": ["q_proj"]}, "--lora-target-modules"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype"),
        ({"kv_cache_dtype": "float16", "dtype": "float32"}, "computes in float32, got float16"),
        ({"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "skip-layers"),
        ({"additional_config": {"kv_cache_dtype": {"key": "int5"}}}, "int5"),
        ({"load_format": "dummy"}, "--load-format"),
        ({"cpu_offload_gb": 4}, "--cpu-offload-gb, got 4"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"attention_backend": "FLASH_ATTN"}, "--attention-backend, got FLASH_ATTN"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"logits_processors": ["some.module:Class"]}, "--logits-processors"),
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "method ngram, got ngram_gpu",
        ),
    ],
)
def test_unsupported_options_are_named(vllm_config, options, text) -> None:  # type: ignore[no-untyped-def]
    from vllm_metal_plugin.errors import UnsupportedConfigError

    with pytest.raises(UnsupportedConfigError, match=text):
        vllm_config(**options)


def test_drafts_need_pages(vllm_config, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from vllm_metal_plugin.errors import UnsupportedConfigError

    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    with pytest.raises(UnsupportedConfigError, match="VLLM_METAL_USE_PAGED_ATTENTION=0"):
        vllm_config(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})


def test_contiguous_path_leaves_prefixes_to_the_worker(  # type: ignore[no-untyped-def]
    vllm_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_metal_plugin.config import MetalConfig
    from vllm_metal_plugin.errors import UnsupportedConfigError

    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    config = vllm_config()
    assert not config.cache_config.enable_prefix_caching
    assert MetalConfig.from_vllm(config).keep_prefixes
    with pytest.raises(UnsupportedConfigError, match="--kv-cache-dtype auto"):
        vllm_config(kv_cache_dtype="fp8")
    monkeypatch.setenv("VLLM_METAL_PREFIX_CACHE", "0")
    assert not MetalConfig.from_vllm(vllm_config()).keep_prefixes
