"""The commands about models, through main(), against local hubs."""

import json
import os
import subprocess
import sys

import pytest

from vllm_metal_hub import resolve
from vllm_metal_hub.cli import main
from vllm_metal_hub.testing.repository import safetensors

WEIGHTS = safetensors("a", 200_000)
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": WEIGHTS}


@pytest.fixture(params=["hf", "ms"])
def model(request, hub, forget):
    """A pulled model: how it is written."""
    hub.add("org/tiny", dict(FILES))
    return f"{request.param}://org/tiny"


def out(capsys, *argv):
    code = main(list(argv))
    assert code == 0
    return capsys.readouterr().out


def test_a_model_from_pull_to_rm(hub, model, capsys, tmp_path, forget, monkeypatch):
    path = out(capsys, "pull", model).strip()
    assert os.listdir(path)
    assert out(capsys, "path", model).strip() == path
    assert "org/tiny" in out(capsys, "list")
    listed = json.loads(out(capsys, "list", "--json"))
    assert (listed[0]["model"], listed[0]["path"]) == ("org/tiny", path)
    assert "ok" in out(capsys, "verify", model)

    weights = os.path.realpath(os.path.join(path, "model.safetensors"))
    with open(weights, "r+b") as file:
        file.seek(1000)
        file.write(b"xx")
    assert main(["verify", model]) == 6
    assert "Run with --repair" in capsys.readouterr().err
    forget()
    assert "ok" in out(capsys, "verify", model, "--repair")

    archive = str(tmp_path / "tiny.tar")
    out(capsys, "export", model, archive)
    out(capsys, "rm", model)
    assert not os.path.exists(path)
    hub.close()
    out(capsys, "import", archive)
    forget()
    again = out(capsys, "path", model).strip()
    with open(os.path.join(again, "model.safetensors"), "rb") as file:
        assert file.read() == WEIGHTS


def test_a_directory_gets_a_name(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for name, content in FILES.items():
        (tmp_path / "mine" / name).write_bytes(content)
    assert main(["import", str(tmp_path / "mine")]) == 2
    capsys.readouterr()
    out(capsys, "import", str(tmp_path / "mine"), "--as", "me/mine")
    assert out(capsys, "path", "me/mine").strip() == str(tmp_path / "mine")


def test_an_archive_that_was_changed_is_refused(hub, tmp_path, capsys):
    hub.add("org/tiny", dict(FILES))
    out(capsys, "pull", "org/tiny")
    archive = tmp_path / "tiny.tar"
    out(capsys, "export", "org/tiny", str(archive))
    content = bytearray(archive.read_bytes())
    content[content.index(WEIGHTS[:64]) + 5000] ^= 1
    archive.write_bytes(content)
    assert main(["import", str(archive)]) == 6
    (tmp_path / "x.tar").write_bytes(b"no archive")
    assert main(["import", str(tmp_path / "x.tar")]) == 2


def test_rm_keeps_bytes_that_another_revision_uses(hub, capsys):
    repository = hub.add("org/tiny", dict(FILES))
    repository.tags["v1"] = {**FILES, "config.json": b'{"v": 1}'}
    main_path = out(capsys, "pull", "org/tiny").strip()
    out(capsys, "pull", "org/tiny@v1")
    out(capsys, "rm", "org/tiny@v1")
    with open(os.path.join(main_path, "model.safetensors"), "rb") as file:
        assert file.read() == WEIGHTS


def test_exec_replaces_ids_and_leaves_other_words(hub, tmp_path):
    hub.add("org/tiny", dict(FILES))
    program = "import sys, os; print(sys.argv[1:], os.environ['HF_HUB_OFFLINE'])"
    done = subprocess.run(
        [
            sys.executable, "-m", "vllm_metal_hub", "exec", "--", sys.executable, "-c", program,
            "hf://org/tiny", "--draft=hf://org/tiny", "text", "a/b/c",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stdout
    assert words.count("snapshots") == 2
    assert "--draft=/" in words
    assert "'text', 'a/b/c'" in words
    assert words.strip().endswith("1")


def test_progress_is_plain_lines_when_not_a_terminal(hub, capsys):
    hub.add("org/tiny", dict(FILES))
    main(["pull", "org/tiny"])
    captured = capsys.readouterr()
    assert "org/tiny: fetching 3 of 3 files, 200" in captured.err
    assert "\x1b" not in captured.err


@pytest.mark.parametrize(
    ("argv", "code"), [(["pull", "org/none"], 3), (["pull", "http://x"], 2), (["rm", "org/x"], 3)]
)
def test_exit_codes(hub, capsys, argv, code):
    assert main(argv) == code
    assert capsys.readouterr().err.startswith("vllm-metal: [")


def test_every_result_is_there_for_scripts(hub, capsys, tmp_path):
    hub.add("org/tiny", dict(FILES))
    run = lambda *argv: json.loads(out(capsys, *argv, "--json"))  # noqa: E731
    path = run("pull", "org/tiny")["path"]
    assert run("path", "org/tiny")["path"] == path
    assert run("verify", "org/tiny") == {"ok": True, "problems": {}}
    assert run("export", "org/tiny", str(tmp_path / "x.tar"))["bytes"] > len(WEIGHTS)
    assert list(run("rm", "org/tiny")["removed"]) == ["org/tiny"]
    assert run("import", str(tmp_path / "x.tar"))["repo"] == "org/tiny"
    assert run("list")[0]["model"] == "org/tiny"
    assert out(capsys, "list", "--names") == "org/tiny\n"


def test_rm_takes_what_plan_and_both_hubs_left(hub, capsys, monkeypatch, forget, tmp_path):
    hub.add("org/tiny", dict(FILES))
    resolve("hf://org/tiny", profile="small")
    assert out(capsys, "list", "--names") == ""
    forget()
    for model in ("hf://org/tiny", "ms://org/tiny"):
        out(capsys, "pull", model)
    assert [item["bytes"] for item in json.loads(out(capsys, "list", "--json"))] == [sum(map(len, FILES.values()))] * 2
    assert json.loads(out(capsys, "rm", "org/tiny", "--json"))["removed"]["org/tiny"] > 2 * len(WEIGHTS)
    assert "No models yet" in out(capsys, "list")
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= len(WEIGHTS)]
    assert left == []


def test_rm_takes_what_only_plan_fetched(hub, capsys):
    hub.add("org/tiny", dict(FILES))
    resolve("org/tiny", profile="small")
    assert "org/tiny:small-files" in out(capsys, "list")
    out(capsys, "rm", "org/tiny")
    assert "No models yet" in out(capsys, "list")


def test_paths_that_cannot_be_written_are_one_line(hub, capsys, tmp_path):
    hub.add("org/tiny", dict(FILES))
    out(capsys, "pull", "org/tiny")
    assert main(["export", "org/tiny", str(tmp_path / "no" / "x.tar")]) == 1
    assert capsys.readouterr().err.startswith("vllm-metal: [files] expected")


def test_a_table_for_pipes_has_paths_in_one_piece(hub, capsys, tmp_path):
    hub.add("org/tiny", dict(FILES))
    path = out(capsys, "pull", "org/tiny").strip()
    assert path in out(capsys, "list")
