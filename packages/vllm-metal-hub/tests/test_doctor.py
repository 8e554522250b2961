import json
import os
import subprocess
import sys

from vllm_metal_hub.doctor_checks import cache_checks, environment_checks, mlx_checks
from vllm_metal_hub.doctor_hubs import hub_checks


def by_name(checks):
    return {check.name: check for check in checks}


def test_traps_are_found(monkeypatch):
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.setenv("VLLM_PLUGINS", "metal")
    monkeypatch.setenv("VLLM_METAL_MEMORY_FRACTOIN", "0.5")
    found = by_name(environment_checks())
    assert found["VLLM_TARGET_DEVICE"].status == "fail"
    assert found["VLLM_PLUGINS"].status == "fail"
    assert "metal_general" in found["VLLM_PLUGINS"].advice
    assert found["VLLM_METAL_MEMORY_FRACTOIN"].status == "warn"


def test_a_clean_environment_is_ok(monkeypatch):
    for name in ("VLLM_TARGET_DEVICE", "VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    assert {check.status for check in environment_checks()} == {"ok"}


def test_tokens_are_never_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in repr(list(environment_checks()))


def test_bad_values_are_explained(monkeypatch):
    monkeypatch.setenv("VLLM_METAL_HUB_UPDATE", "sometimes")
    assert "never, check or always" in by_name(environment_checks())["Values"].found


def test_the_device_compiles():
    found = by_name(mlx_checks())
    assert found["Device"].status == "ok"
    assert found["Compiler"].status == "ok"


def test_caches_and_disk():
    found = by_name(cache_checks())
    assert "not there yet" in found["Hugging Face cache"].found
    assert "free at" in found["Disk"].found


def test_json_for_scripts():
    env = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_metal_hub", "doctor", "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["ok"] is False
    assert {"group", "name", "status", "found", "advice"} == set(report["checks"][0])
    assert [c["status"] for c in report["checks"] if c["name"] == "VLLM_TARGET_DEVICE"] == ["fail"]


def test_hubs_that_answer_and_hubs_that_do_not(hub, monkeypatch):
    found = by_name(hub_checks())
    assert "answers in" in found["Hugging Face"].found
    assert "a mirror that you chose" in found["ModelScope"].found
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "would not go to" in by_name(hub_checks())["Hugging Face token"].found
    assert by_name(hub_checks())["ModelScope token"].found.startswith("none")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    monkeypatch.setenv("VLLM_METAL_HUB_TOKEN_TO_MIRROR", "1")
    assert "would go to" in by_name(hub_checks())["ModelScope token"].found
    assert "secret" not in repr(list(hub_checks()))
    hub.close()
    assert by_name(hub_checks())["Hugging Face"].status == "warn"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [check.found for check in hub_checks()] == ["HF_HUB_OFFLINE is set: no hub is asked"]
