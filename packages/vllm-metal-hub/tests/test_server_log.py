from vllm_metal_hub.server_log import ServerLog

PREFIX = "(EngineCore pid=12) INFO 11-21 04:00:00 [kv_cache_utils.py:2327] "


def fed(*lines):
    log = ServerLog()
    for line in lines:
        log.feed(line + "\n")
    return log


def test_stages_only_move_forward():
    log = ServerLog()
    assert log.feed("(APIServer pid=1) INFO 11-21 04:00:00 [model.py:1] Resolved architecture: LlamaForCausalLM")
    assert log.stage == "starting the engine"
    assert not log.feed("(APIServer pid=1) INFO 11-21 04:00:00 [x.py:1] non-default args: {}")
    assert log.feed("INFO:     Application startup complete.")
    assert log.stage == "ready"


def test_capacity_is_read_from_the_engines_line():
    log = fed(PREFIX + "CPU KV cache size: 12,345 tokens, Maximum concurrency for 2,048 tokens per request: 6.03x")
    assert (log.kv_cache_tokens, log.max_model_len, log.max_concurrency) == (12345, 2048, 6.03)


def test_the_reason_is_the_cause_not_its_wrapper():
    log = fed(
        "(EngineCore pid=12) ERROR 11-21 04:00:00 [core.py:1] Traceback (most recent call last):",
        '(EngineCore pid=12) ERROR 11-21 04:00:00 [core.py:1]   File "x.py", line 1, in f',
        "(EngineCore pid=12) ERROR 11-21 04:00:00 [core.py:1] ValueError: not enough memory for the KV cache",
        "Traceback (most recent call last):",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    )
    assert log.reason() == "ValueError: not enough memory for the KV cache"


def test_a_plugin_error_printed_as_one_message_is_the_reason():
    assert fed("error: [model] expected X, got Y. Do Z.").reason() == "[model] expected X, got Y. Do Z."


def test_the_last_lines_leave_out_frames():
    log = fed("first", "Traceback (most recent call last):", '  File "x.py", line 1', "    f()", "last")
    assert log.last_lines() == ["first", "last"]


def test_a_server_that_said_nothing():
    assert fed().reason() == "it printed nothing"
