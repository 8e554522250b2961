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
