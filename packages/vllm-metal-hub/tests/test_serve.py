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


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "vocab_size": 256, "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "float16",
}  # fmt: skip


def test_the_plan_is_shown_before_anything_starts(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    assert "2,048 tokens" in shown_output(capsys, str(tmp_path))
    assert main(["serve", str(tmp_path), "--json", "--gpu-memory-utilization", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["plan"]["context"], found["plan"]["fits"]) == (2048, True)
    assert found["command"][-2:] == ["--gpu-memory-utilization", "0.5"]
    assert {"flag": "--max-model-len", "value": "auto"}.items() <= found["flags"][0].items()


def shown_output(capsys, path):
    assert main(["serve", path, "--dry-run"]) == 0
    captured = capsys.readouterr()
    return captured.err


def test_an_architecture_that_cannot_be_planned_is_said_and_left_to_vllm(model, capsys):
    assert "No plan: " in shown(capsys, model("nothing_like_it"))


def test_a_template_that_comes_with_the_model_is_used_when_its_own_knows_no_tools(model, tmp_path, capsys):
    path = model("gemma4")
    (tmp_path / "tool_template.jinja").write_text("{% for tool in tools %}{% endfor %}")
    assert f"--chat-template {tmp_path}/tool_template.jinja" in shown(capsys, path)
    assert "--chat-template" not in shown(capsys, path, "--chat-template=mine").replace("--chat-template=mine", "")
    (tmp_path / "chat_template.jinja").write_text("{% if tools %}{% endif %}")
    assert "--chat-template" not in shown(capsys, path)


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
    for model_type in ("gemma4", "qwen3_5", "qwen3_next", "qwen3", "qwen2", "gpt_oss", "glm4_moe", "seed_oss"):
        assert flags_for(model_type)[0]
        for flag in flags_for(model_type)[1]:
            if flag.flag == "--tool-call-parser":
                assert flag.value in tools
            if flag.flag == "--reasoning-parser":
                assert flag.value in thoughts
