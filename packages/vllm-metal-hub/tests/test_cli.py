import os
import shutil
import subprocess

import pytest

from vllm_metal_hub.cli import build_parser, main


def test_help_lists_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "demo" in text
    assert "doctor" in text
    assert "exit codes:" in text


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_an_error_is_one_line_and_its_exit_code(capsys):
    assert main(["demo", "--model", "./nothing-here"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vllm-metal: [model] expected")


def test_a_taken_port_is_refused_before_anything_starts(capsys, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--model", str(tmp_path), "--port", str(port)]) == 2
    assert "Choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_token_counts_are_positive(value):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["demo", "--max-tokens", value])


MODELS = 'case "$*" in "list --names") echo "org/first"; echo "me/second:Q4_0";; esac'


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Runs a shell in which the completion is loaded and two models are on the machine."""
    (tmp_path / "vllm-metal").write_text(f"#!/bin/sh\n{MODELS}\n")
    (tmp_path / "vllm-metal").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def run(name, *command):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        assert main(["completion", name]) == 0
        (tmp_path / name).mkdir()
        (tmp_path / name / "script").write_text(capsys.readouterr().out)
        done = subprocess.run(
            [name, *command], env={**os.environ, "SCRIPT": str(tmp_path / name / "script")}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.split()

    return run


BASH = """source "$SCRIPT"
complete_line() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vllm_metal; printf '%s\n' "${COMPREPLY[@]}"; }
complete_line vllm-metal pu; complete_line vllm-metal pull --up; complete_line vllm-metal serve org/
complete_line vllm-metal completion z"""


def test_bash_completes_commands_flags_and_models(shell):
    assert shell("bash", "-c", BASH) == ["pull", "--update", "org/first", "zsh"]


def test_fish_completes_commands_flags_and_models(shell):
    lines = [f"complete -C 'vllm-metal {words}'" for words in ("pu", "pull --up", "serve org/", "completion z")]
    found = shell("fish", "-c", "source $SCRIPT; " + "; ".join(lines))
    assert [word for word in found if word in ("pull", "--update", "org/first", "zsh")] == [
        "pull", "--update", "org/first", "zsh",
    ]  # fmt: skip


ZSH = """autoload -U compinit; compinit -u -D; source "$SCRIPT"; print ${_comps[vllm-metal]}
compadd() { print -l "${(@P)argv[-1]}"; }; _files() {}; _vllm_metal_models
_arguments() { print -l $words[1] "${(M)@:#--*}"; }; words=(vllm-metal pull --up); CURRENT=3; _vllm_metal"""


def test_zsh_completes_commands_flags_and_models(shell):
    found = shell("zsh", "-f", "-c", ZSH)
    assert found[:3] == ["_vllm_metal", "org/first", "me/second:Q4_0"]
    assert "pull" in found
    assert any(word.startswith("--update[") for word in found)
