import json

import pytest

from vllm_metal_hub.cli import main
from vllm_metal_hub.recipes import flags_for, without_given


@pytest.fixture
def model(tmp_path):
    def make(model_type):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return str(tmp_path)

    return make


def shown(capsys, *argv):
    assert main(["serve", *argv, "--dry-run"]) == 0
    return capsys.readouterr().err


def test_a_family_gets_its_parsers_and_a_context_that_fits(model, capsys):
    text = shown(capsys, model("gemma4"), "--port", "8001")
    assert "--tool-call-parser gemma4" in text
    assert "--max-model-len auto" in text
    assert text.strip().endswith("--port 8001")


@pytest.mark.parametrize("given", [["--max-model-len", "4096"], ["--max-model-len=4096"], ["--max_model_len", "4096"]])
def test_a_flag_of_the_users_wins(model, capsys, given):
    text = shown(capsys, model("qwen3"), *given)
    assert "auto" not in text.replace("--enable-auto-tool-choice", "")


def test_explain_says_why(model, capsys):
    text = shown(capsys, model("qwen3_next"), "--explain")
    assert "how this family writes tool calls" in text


def test_a_model_without_a_recipe_is_served_plainly(model, capsys):
    text = shown(capsys, model("llama"))
    assert "parser" not in text


def test_the_name_that_was_typed_stays(hub, capsys):
    hub.add("org/tiny", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    assert "--served-model-name org/tiny" in shown(capsys, "hf://org/tiny")
    assert shown(capsys, "hf://org/tiny", "--served-model-name", "mine").count("--served-model-name") == 1


def test_switches_turned_off_are_not_turned_on_again():
    _, flags = flags_for("qwen3")
    left = without_given(flags, ["--no-enable-auto-tool-choice"])
    assert "--enable-auto-tool-choice" not in [flag.flag for flag in left]


def test_other_commands_refuse_unknown_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["list", "--nonsense"])
    assert stop.value.code == 2


def test_parsers_of_recipes_are_vllms():
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    tools, thoughts = ToolParserManager.list_registered(), ReasoningParserManager.list_registered()
    for model_type in ("gemma4", "qwen3_5", "qwen3", "gpt_oss"):
        for flag in flags_for(model_type)[1]:
            if flag.flag == "--tool-call-parser":
                assert flag.value in tools
            if flag.flag == "--reasoning-parser":
                assert flag.value in thoughts
