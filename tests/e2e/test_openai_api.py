"""Everything a client of the OpenAI API does to a running server."""

import asyncio
import json
import math

import openai
import pytest
from live_server import Server

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
STORY = "Once upon a time, in a small village by the sea,"


def test_models_lists_the_served_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]


def test_chat_answers_in_english(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=40)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40


def test_completion_is_reproducible_and_counts_tokens(client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "prompt": STORY, "temperature": 0, "max_tokens": 24}
    first, second = (client.completions.create(**options) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == 24


def test_streaming_gives_the_same_text_piece_by_piece(client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt=["The sky is", "Grass is"], n=3, temperature=1.0, max_tokens=8, seed=1
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices[:3]}) > 1


def test_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "prompt": STORY, "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**options).choices[0].text
    word = whole.split()[4]
    cut = client.completions.create(**options, stop=[word])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == whole[: whole.index(word)]


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tool_call_has_valid_arguments(client: openai.OpenAI, choice: object) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the weather in Paris, in celsius?"}],
        tools=[TOOL],
        tool_choice=choice,
        temperature=0,
        max_tokens=100,
    )
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "get_weather"
    arguments = json.loads(call.arguments)
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("celsius", "fahrenheit")


def test_automatic_tool_choice_still_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, tools=[TOOL], temperature=0, max_tokens=60
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema_is_obeyed(client: openai.OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Describe a person as JSON."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
        },
        temperature=temperature,
        seed=3,
        max_tokens=120,
    )
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age", "tags"}
    assert 0 <= person["age"] <= 120
    assert set(person["tags"]) <= {"a", "b"}


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ({"choice": ["yes", "no", "perhaps"]}, lambda text: text in ("yes", "no", "perhaps")),
        ({"regex": "[0-9]{3}-[0-9]{4}"}, lambda text: len(text) == 8 and text[3] == "-"),
        ({"grammar": 'root ::= "SELECT " ("a" | "b") " FROM t"'}, lambda text: text.startswith("SELECT ")),
    ],
    ids=["choice", "regex", "grammar"],
)
def test_structured_outputs(client: openai.OpenAI, rule: dict, matches) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        max_tokens=30,
        temperature=0.7,
        extra_body={"structured_outputs": rule},
    )
    assert matches(answer.choices[0].message.content)


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=4
    )
    for token in answer.choices[0].logprobs.content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert len(token.top_logprobs) == 4
        assert math.fsum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0 + 1e-4


def test_prompt_logprobs_agree_with_generated_ones(client: openai.OpenAI) -> None:
    """The log probabilities of a text are the same whether it was generated or given."""
    made = client.completions.create(model="smollm2", prompt=STORY, temperature=0, max_tokens=8, logprobs=1)
    given = client.completions.create(
        model="smollm2",
        prompt=STORY + made.choices[0].text,
        max_tokens=1,
        temperature=0,
        echo=True,
        logprobs=1,
    )
    count = len(made.choices[0].logprobs.token_logprobs)
    echoed = given.choices[0].logprobs.token_logprobs[:-1]
    assert echoed[0] is None
    assert echoed[-count:] == pytest.approx(made.choices[0].logprobs.token_logprobs, abs=2e-3)


def test_same_seed_same_text_other_seed_other_text(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(model="smollm2", prompt=STORY, temperature=1.0, max_tokens=24, seed=seed)
        return answer.choices[0].text

    assert text(11) == text(11)
    assert text(11) != text(12)


def test_seed_does_not_depend_on_the_batch(server: Server, client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "prompt": STORY, "temperature": 1.0, "max_tokens": 16, "seed": 5}
    alone = client.completions.create(**options).choices[0].text

    async def together() -> list[str]:
        async with server.async_client() as many:
            others = [many.completions.create(**{**options, "seed": seed}) for seed in range(20, 25)]
            answers = await asyncio.gather(many.completions.create(**options), *others)
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(together())[0] == alone


def test_penalties_bad_words_and_biases_change_the_text(client: openai.OpenAI) -> None:
    prompt = "The days of the week are Monday, Tuesday, Wednesday,"
    options = {"model": "smollm2", "prompt": prompt, "temperature": 0, "max_tokens": 12}

    def text(**changes: object) -> str:
        return client.completions.create(**options, **changes).choices[0].text

    plain = text()
    assert plain.startswith(" Thursday, Friday")
    assert text(frequency_penalty=2.0, presence_penalty=2.0).count(",") < plain.count(",")
    assert "Thursday" not in text(extra_body={"bad_words": ["Thursday"]})
    assert text(logit_bias={"100": 100}) == 12 * text(extra_body={"allowed_token_ids": [100], "max_tokens": 1})


def test_min_tokens_delays_the_end(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=60, extra_body={"min_tokens": 50}
    )
    assert answer.usage.completion_tokens >= 50


def test_thirty_two_concurrent_requests(server: Server, client: openai.OpenAI) -> None:
    prompts = [f"Count: {number}, {number + 1}, {number + 2}," for number in range(32)]
    options = {"model": "smollm2", "temperature": 0, "max_tokens": 12}
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts[:4]]

    async def together() -> list[str]:
        async with server.async_client() as many:
            answers = await asyncio.gather(*(many.completions.create(prompt=prompt, **options) for prompt in prompts))
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(together())
    assert all(texts)
    assert texts[:4] == alone


def test_aborted_streams_do_not_disturb_others(server: Server, client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "prompt": STORY, "temperature": 0}
    expected = client.completions.create(**options, max_tokens=24).choices[0].text

    async def abort(many: openai.AsyncOpenAI, after: int) -> None:
        stream = await many.completions.create(**options, max_tokens=500, stream=True)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen >= after:
                break
        await stream.close()

    async def together() -> str:
        async with server.async_client() as many:
            answer, *_ = await asyncio.gather(
                many.completions.create(**options, max_tokens=24),
                *(abort(many, after) for after in (1, 2, 5, 9)),
            )
        return answer.choices[0].text

    assert asyncio.run(together()) == expected
