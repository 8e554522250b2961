"""A class is looked at in this process: the first start of an architecture imports vLLM once less."""

import inspect
import os
from pathlib import Path

import pytest
from vllm import ModelRegistry
from vllm.model_executor.models import registry

from vllm_metal_plugin.upstream_fixes import model_inspection as fix


def test_workaround_is_still_needed() -> None:
    """Fails when vLLM looks at classes in some other way: then the file can go."""
    assert "_run_in_subprocess(" in inspect.getsource(registry)


def test_no_process_is_started_and_what_was_seen_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    fix.install()
    fix.install()
    before = os.times()
    seen = ModelRegistry.models["GraniteForCausalLM"].inspect_model_cls()
    after = os.times()
    assert after.children_user + after.children_system == before.children_user + before.children_system
    assert seen.is_text_generation_model
    assert seen.architecture == "GraniteForCausalLM"
    assert [file.name for file in (tmp_path / "modelinfos").iterdir()] == [
        "vllm-model_executor-models-granite-GraniteForCausalLM.json"
    ]
