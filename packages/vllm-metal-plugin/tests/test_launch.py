"""How a launch that cannot go on ends: with a sentence."""

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.launcher import create_server_socket

from vllm_metal_plugin.errors import UnsupportedConfigError
from vllm_metal_plugin.launch import message_for_users


def test_a_value_out_of_range_is_named(model_dir) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedConfigError, match=r"gpu_memory_utilization: Input should be .* got 1\.5"):
        EngineArgs(model=str(model_dir), gpu_memory_utilization=1.5).create_engine_config()


def test_an_unknown_reasoning_parser_and_a_taken_port_are_sentences(model_dir) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KeyError) as unknown:
        EngineArgs(model=str(model_dir), reasoning_parser="nope").create_engine_config()
    assert "'nope' not found" in str(message_for_users(unknown.value, unknown.tb))
    first = create_server_socket(("127.0.0.1", 0), reuse_port=False)
    first.listen()
    with first, pytest.raises(OSError, match="in use") as taken:
        create_server_socket(first.getsockname(), reuse_port=False)
    assert "Choose another --port" in str(message_for_users(taken.value, taken.tb))


class Interrupted:
    """Options that the user does not wait for."""

    def __getattr__(self, name: str) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_before_the_server_is_ready_is_a_sentence() -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        ServeSubcommand.cmd(Interrupted())
    assert message_for_users(stopped.value, stopped.tb) == "[server] stopped before it was ready."
    with pytest.raises(KeyboardInterrupt) as elsewhere:
        raise KeyboardInterrupt
    assert message_for_users(elsewhere.value, elsewhere.tb) is None


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError) as other:
        raise ZeroDivisionError
    assert message_for_users(other.value, other.tb) is None
