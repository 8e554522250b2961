"""What a launch names becomes local paths before vLLM's configuration is built."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_metal_hub import remove, resolve
from vllm_metal_hub.testing.repository import safetensors
from vllm_metal_hub.vllm_paths import local_path
from vllm_metal_hub.vllm_plugin import prepare, register
from vllm_metal_plugin.errors import ModelFilesError

FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": safetensors("a", 1000)}


def engine_args(**given):
    empty = (
        "tokenizer", "tokenizer_revision", "revision", "code_revision", "hf_config_path", "speculative_config",
        "default_mm_loras", "served_model_name",
    )  # fmt: skip
    defaults = dict.fromkeys(empty) | {"trust_remote_code": False, "enable_lora": False, "generation_config": "auto"}
    return SimpleNamespace(**defaults | {"model": "org/main"} | given)


def test_everything_beside_the_model_becomes_a_path(hub):
    for name in ("tok", "config", "draft", "lora", "gen"):
        hub.add(f"org/{name}", dict(FILES))
    args = engine_args(
        tokenizer="org/tok", hf_config_path="org/config", speculative_config={"model": "org/draft", "n": 3},
        default_mm_loras={"audio": "org/lora"}, generation_config="org/gen",
    )  # fmt: skip
    prepare(args)
    found = [args.tokenizer, args.hf_config_path, args.speculative_config["model"], args.default_mm_loras["audio"]]
    found.append(args.generation_config)
    assert all(path.startswith("/") for path in found)
    assert args.speculative_config["n"] == 3
    assert args.model == "org/main"
    hub.forget()
    prepare(args)
    assert [args.tokenizer, args.hf_config_path] == found[:2]
    assert hub.requests == []


def test_a_tokenizer_from_elsewhere_costs_no_weights(hub):
    hub.add("org/tok", dict(FILES))
    prepare(args := engine_args(tokenizer="org/tok"))
    assert args.tokenizer.startswith("/")
    assert not [r for r in hub.requests if "safetensors" in r.path]


def test_methods_that_are_no_models_are_left_alone(hub):
    prepare(args := engine_args(speculative_config={"method": "ngram", "model": "ngram"}))
    assert args.speculative_config["model"] == "ngram"
    assert hub.requests == []


def test_errors_are_the_plugins_own_kind(hub):
    with pytest.raises(ModelFilesError, match="org/none"):
        local_path("org/none", None)


CODE = {"configuration_odd.py": b"import vendored\n", "vendored.py": b"", "config.json": b"{}"}
AUTO_MAP = {"AutoConfig": "org/code--configuration_odd.OddConfig"}


def test_code_of_another_repository_is_local_where_it_is_trusted(hub):
    config = {"model_type": "odd", "auto_map": AUTO_MAP, "text_config": {"auto_map": dict(AUTO_MAP)}}
    tokenizer = {"auto_map": {"AutoTokenizer": ["org/code--words.Slow", None]}}
    configs = {"config.json": json.dumps(config).encode(), "tokenizer_config.json": json.dumps(tokenizer).encode()}
    hub.add("org/main", {**FILES, **configs})
    hub.add("org/code", dict(CODE))
    args = engine_args(trust_remote_code=True, tokenizer="org/main")
    prepare(args)
    assert (args.served_model_name, args.tokenizer) == (["org/main"], args.model)
    folder = Path(args.model)
    written = json.loads((folder / "config.json").read_text())
    assert written["auto_map"] == written["text_config"]["auto_map"] == {"AutoConfig": "configuration_odd.OddConfig"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["auto_map"] == {
        "AutoTokenizer": ["words.Slow", None]
    }
    assert (folder / "vendored.py").is_file()
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    hub.forget()
    prepare(args)
    assert args.model == str(folder)
    prepare(again := engine_args(trust_remote_code=True))
    assert again.model == str(folder)
    assert hub.requests == []
    remove("org/main")
    assert not folder.exists()


def test_code_is_not_fetched_unless_it_is_trusted(hub):
    hub.add("org/main", {**FILES, "config.json": json.dumps({"auto_map": AUTO_MAP}).encode()})
    prepare(args := engine_args())
    assert (args.model, hub.requests) == ("org/main", [])


def test_two_modules_of_one_name_are_refused(hub, tmp_path):
    hub.add("org/code", dict(CODE))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"auto_map": AUTO_MAP}))
    (tmp_path / "m" / "vendored.py").write_text("other")
    with pytest.raises(ModelFilesError, match=r"vendored\.py"):
        prepare(engine_args(model=str(tmp_path / "m"), trust_remote_code=True))


ADAPTER = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": safetensors("a", 500)}


@pytest.fixture
def vllm_arguments():
    """vLLM's own argument parser and engine arguments, with our plugin in."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    parser = make_arg_parser(FlexibleArgumentParser())

    def parse(*words):
        args = parser.parse_args(list(words))
        return args, AsyncEngineArgs.from_cli_args(args)

    return parse


def test_adapters_of_the_command_line_are_local_before_there_is_an_engine(hub, vllm_arguments, tmp_path):
    hub.add("org/lora", dict(ADAPTER))
    args, _ = vllm_arguments(
        "--model", "org/main", "--enable-lora", "--lora-modules", "mine=org/lora", f"x={tmp_path}"
    )
    mine, other = args.lora_modules
    assert (mine.name, other.path) == ("mine", str(tmp_path))
    assert (Path(mine.path) / "adapter_config.json").is_file()


def test_offline_the_name_that_was_typed_is_kept(hub, vllm_arguments, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, made = vllm_arguments("--model", "org/main", "--tokenizer", "org/tok")
    assert (made.model, made.tokenizer) == ("org/main", "org/tok")
    assert hub.requests == []


class Engine:
    """Stands for an engine: notes what reaches it."""

    def __init__(self):
        self.seen = []
        self.engine_core = self

    async def add_lora_async(self, request):
        return self.seen.append(request.lora_path)

    def add_lora(self, request):
        return self.seen.append(request.lora_path)


def test_adapters_that_are_loaded_at_run_time_are_local_before_the_engine_sees_them(hub, tmp_path):
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    hub.add("org/lora", dict(ADAPTER))
    prepare(engine_args(enable_lora=True))
    engine = Engine()
    asyncio.run(AsyncLLM.add_lora(engine, LoRARequest("a", 1, "org/lora")))
    LLMEngine.add_lora(engine, LoRARequest("a", 1, "ms://org/lora"))
    LLMEngine.add_lora(engine, LoRARequest("a", 1, str(tmp_path)))
    assert [Path(path).is_dir() for path in engine.seen] == [True, True, True]
    assert engine.seen[2] == str(tmp_path)
    assert "fetch" in {r.command.split(".")[-1] for r in hub.requests}


def test_an_adapter_that_does_not_exist_is_what_vllm_answers_with_404(hub):
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.request import LoRARequest

    from vllm_metal_hub.vllm_lora import make_local

    with pytest.raises(LoRAAdapterNotFoundError):
        make_local(LoRARequest("a", 1, "org/none"))
    hub.add("org/gated", dict(ADAPTER), gate="token")
    with pytest.raises(ModelFilesError, match="licence"):
        make_local(LoRARequest("a", 1, "org/gated"))


def test_a_request_may_name_an_adapter_that_was_pulled_and_no_other(hub):
    from vllm.lora.resolver import LoRAResolverRegistry

    prepare(engine_args(enable_lora=True))
    adapters = LoRAResolverRegistry.get_resolver("vllm-metal-hub")
    hub.add("org/lora", dict(ADAPTER))
    hub.add("org/main", dict(FILES))
    find = lambda name: asyncio.run(adapters.resolve_lora("/models/base", name))  # noqa: E731
    assert find("org/lora") is None
    assert hub.requests == []
    path = resolve("org/lora").path
    resolve("org/main")
    found = find("org/lora")
    assert (found.lora_name, found.lora_path) == ("org/lora", str(path))
    assert find("org/main") is None
    assert find("not a name") is None
    assert find("/etc") is None
