"""Whatever a client sends, it gets an HTTP error with a reason, and the next request is answered."""

import json
import urllib.error
import urllib.request

import openai
import pytest
from live_server import Server

BASE = {"model": "smollm2", "prompt": "Hello", "max_tokens": 4}
CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}

BAD_COMPLETIONS = {
    "prompt too long": {"prompt": "word " * 4000},
    "max_tokens beyond the context": {"max_tokens": 100_000},
    "negative max_tokens": {"max_tokens": -1},
    "huge n": {"n": 1_000_000},
    "zero n": {"n": 0},
    "wrong type": {"temperature": "warm"},
    "temperature out of range": {"temperature": -1.0},
    "top_p out of range": {"top_p": 1.5},
    "top_k wrong": {"top_k": -7},
    "min_p out of range": {"min_p": 2.0},
    "penalty out of range": {"presence_penalty": 9.0},
    "repetition_penalty zero": {"repetition_penalty": 0.0},
    "too many logprobs": {"logprobs": 100_000},
    "logit_bias outside the vocabulary": {"logit_bias": {"99999999": 1}},
    "allowed_token_ids outside the vocabulary": {"allowed_token_ids": [99_999_999]},
    "empty allowed_token_ids": {"allowed_token_ids": []},
    "token ids outside the vocabulary": {"prompt": [99_999_999]},
    "empty prompt": {"prompt": []},
    "unknown model": {"model": "nobody/nothing"},
    "no prompt at all": {"prompt": None},
    "regex that does not parse": {"structured_outputs": {"regex": "("}},
    "grammar that does not parse": {"structured_outputs": {"grammar": "root ::= ("}},
    "two kinds of structure": {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    "schema that is not one": {"structured_outputs": {"json": {"type": "nonsense"}}},
    "prompt embeddings": {"prompt_embeds": "AAAA", "prompt": None},
    "too many stop strings": {"stop": "x" * 100_000, "min_tokens": 100},
}
BAD_CHATS = {
    "no messages": {"messages": []},
    "image for a text model": {"messages": [{"role": "user", "content": [IMAGE]}]},
    "invalid json schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}
    },
    "unknown tool": {"tool_choice": {"type": "function", "function": {"name": "nope"}}, "tools": []},
    "top_logprobs without logprobs": {"top_logprobs": 5, "logprobs": False},
    "message without role": {"messages": [{"content": "x"}]},
}


def post(server: Server, path: str, body: bytes) -> tuple[int, str]:
    """Send raw bytes; the client library would refuse some of these itself."""
    request = urllib.request.Request(
        f"{server.url}/{path}", data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def assert_refused(status: int, body: str) -> None:
    assert 400 <= status < 500, (status, body[:500])
    error = json.loads(body).get("error", {})
    assert len(error.get("message", "")) > 10, body[:500]


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
def test_bad_completion(server: Server, client: openai.OpenAI, case: str) -> None:
    assert_refused(*post(server, "completions", json.dumps({**BASE, **BAD_COMPLETIONS[case]}).encode()))


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_chat(server: Server, client: openai.OpenAI, case: str) -> None:
    assert_refused(*post(server, "chat/completions", json.dumps({**CHAT, **BAD_CHATS[case]}).encode()))


def test_body_that_is_not_json(server: Server, client: openai.OpenAI) -> None:
    assert_refused(*post(server, "completions", b'{"model": "smollm2", '))


def test_unknown_fields_are_ignored(server: Server, client: openai.OpenAI) -> None:
    status, body = post(server, "completions", json.dumps({**BASE, "no_such_field": 1}).encode())
    assert status == 200, body


def test_error_type_reaches_the_client_library(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|too long|longer than"):
        client.completions.create(model="smollm2", prompt="word " * 4000, max_tokens=4)
