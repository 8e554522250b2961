import pytest

from vllm_metal_plugin.envs import TABLE, read_envs, register_with_vllm
from vllm_metal_plugin.errors import EnvironmentVariableError


def test_defaults_when_nothing_is_set() -> None:
    envs = read_envs({})
    assert envs.memory_fraction is None
    assert envs.use_mlx
    assert not envs.wired_memory
    assert envs.use_paged_attention
    assert envs.device is None
    assert envs.block_size is None
    assert envs.multimodal_mode == "auto"
    assert envs.prefix_cache_fraction == 0.05


@pytest.mark.parametrize("var", TABLE, ids=lambda var: var.name)
def test_default_shown_to_users_is_accepted(var) -> None:  # type: ignore[no-untyped-def]
    if var.default != "unset":
        read_envs({var.name: var.default})


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("VLLM_METAL_MEMORY_FRACTION", "auto", "memory_fraction", None),
        ("VLLM_METAL_MEMORY_FRACTION", "0.7", "memory_fraction", 0.7),
        ("VLLM_METAL_MEMORY_FRACTION", "1", "memory_fraction", 1.0),
        ("VLLM_METAL_WIRED_MEMORY", "1", "wired_memory", True),
        ("VLLM_MLX_DEVICE", "CPU", "device", "cpu"),
        ("VLLM_METAL_BLOCK_SIZE", "32", "block_size", 32),
        ("VLLM_METAL_USE_MLX", "0", "use_mlx", False),
        ("VLLM_USE_MODELSCOPE", "True", "use_modelscope", True),
        ("VLLM_METAL_MLA_KERNEL", "auto", "mla_kernel", None),
        ("VLLM_METAL_MLA_KERNEL", "0", "mla_kernel", False),
        ("VLLM_METAL_COMPILED_DECODE", "1", "compiled_decode", True),
        ("VLLM_METAL_MULTIMODAL_MODE", "text-only-compat", "multimodal_mode", "text-only-compat"),
        ("VLLM_METAL_PREFIX_CACHE", "1", "prefix_cache", True),
    ],
)
def test_values(name: str, text: str, field: str, value: object) -> None:
    assert getattr(read_envs({name: text}), field) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("VLLM_METAL_MEMORY_FRACTION", "0"),
        ("VLLM_METAL_MEMORY_FRACTION", "1.1"),
        ("VLLM_METAL_MEMORY_FRACTION", "nan"),
        ("VLLM_METAL_MEMORY_FRACTION", "much"),
        ("VLLM_MLX_DEVICE", "tpu"),
        ("VLLM_METAL_BLOCK_SIZE", "24"),
        ("VLLM_METAL_BLOCK_SIZE", "-16"),
        ("VLLM_METAL_USE_PAGED_ATTENTION", "maybe"),
        ("VLLM_METAL_MULTIMODAL_MODE", "some"),
        ("VLLM_METAL_PREFIX_CACHE_FRACTION", "0"),
    ],
)
def test_bad_value_names_variable_value_and_allowed_set(name: str, text: str) -> None:
    allowed = next(var.allowed for var in TABLE if var.name == name)
    with pytest.raises(EnvironmentVariableError) as error:
        read_envs({name: text})
    assert name in str(error.value)
    assert repr(text) in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(
    ("fraction", "paged", "valid"),
    [("auto", "0", True), ("auto", "1", True), ("0.7", "1", True), ("0.7", "0", False)],
)
def test_fraction_and_paged_attention(fraction: str, paged: str, valid: bool) -> None:
    environ = {"VLLM_METAL_MEMORY_FRACTION": fraction, "VLLM_METAL_USE_PAGED_ATTENTION": paged}
    if valid:
        read_envs(environ)
        return
    with pytest.raises(EnvironmentVariableError, match="VLLM_METAL_MEMORY_FRACTION"):
        read_envs(environ)


def test_vllm_knows_every_name() -> None:
    from vllm import envs as vllm_envs

    register_with_vllm()
    assert {var.name for var in TABLE} <= set(vllm_envs.environment_variables)
