import mlx.core as mx
import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_metal_plugin.sampling import GrammarRows, Sampler, SamplingState

VOCAB = 1000
GREEDY = {"temperature": 0.0}


class Numbers:
    """A tokenizer whose words are token ids."""

    max_token_id = VOCAB - 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]


def forbidding(bad_words: list[str], **options) -> SamplingParams:
    params = SamplingParams(bad_words=bad_words, **options)
    params.update_from_tokenizer(Numbers())
    return params


def normal(rows: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * 3).astype(np.float32)


def state_of(*requests: dict, prompt=(1, 2, 3), output=(), vocab: int = VOCAB) -> SamplingState:
    state = SamplingState(max(len(requests), 1), vocab, seed=0)
    for row, options in enumerate(requests):
        state.add(row, str(row), SamplingParams(**options), list(prompt), list(output))
    return state


def sample(logits: np.ndarray, state: SamplingState, grammar=None, mode: str = "raw_logprobs") -> list[int]:
    out = Sampler(logits.shape[1], mode)(mx.array(logits), range(len(logits)), state, grammar)
    return out.token_ids.tolist()


def test_greedy_rows_take_the_largest_logit_whatever_the_rest_of_the_batch_does():
    logits = normal(4)
    state = state_of(GREEDY, {"temperature": 1.0}, GREEDY, {"top_k": 5})
    tokens = sample(logits, state)
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()


def test_equal_logits_go_to_the_smallest_token():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [17, 400]] = 5
    assert sample(logits, state_of(GREEDY)) == [17]


def penalised(row: np.ndarray, prompt, output, repetition: float, frequency: float, presence: float):
    row = row.astype(np.float64).copy()
    for token in set(prompt) | set(output):
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
    for token in set(output):
        row[token] -= frequency * list(output).count(token) + presence
    return row


@pytest.mark.parametrize("repetition", [1.0, 0.7, 1.8])
@pytest.mark.parametrize(("frequency", "presence"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.9), (-0.4, 0.3)])
def test_penalties_follow_the_tokens_as_they_are_sampled(repetition, frequency, presence):
    options = {
        "temperature": 0.0,
        "repetition_penalty": repetition,
        "frequency_penalty": frequency,
        "presence_penalty": presence,
        "logprobs": -1,
    }
    prompt, output = [5, 6, 7, 7], [7, 8]
    state = state_of(options, GREEDY, options, prompt=prompt, output=output)
    sampler = Sampler(VOCAB, "processed_logits")
    outputs = [list(output) for _ in range(3)]
    for step in range(5):
        logits = normal(3, seed=7)
        logits[:, [5, 8, 20, 30]] += 12 + step / 10
        out = sampler(mx.array(logits), range(3), state)
        tokens = out.token_ids.tolist()
        lists = out.logprobs.to_lists(range(3), 3)
        for row in (0, 2):
            expected = penalised(logits[row], prompt, outputs[row], repetition, frequency, presence)
            got = lists.slice_request(row, 1)
            np.testing.assert_allclose(
                got.logprobs[0, 1:], expected[got.logprob_token_ids[0, 1:]], rtol=1e-5, atol=1e-5
            )
            assert tokens[row] == expected.argmax()
        for row in range(3):
            outputs[row].append(tokens[row])


def test_rows_that_do_not_emit_stay():
    options = {"temperature": 0.9, "seed": 4, "frequency_penalty": 1.0, "repetition_penalty": 1.3}
    logits = normal(2)
    together, apart = state_of(options, options), state_of(options, options)
    sampler = Sampler(VOCAB)
    first = sampler(mx.array(logits[:1]), [0], apart)
    mx.eval(first.arrays(), apart.arrays())
    assert apart.num_output_tokens.tolist() == [1, 0]
    second = sampler(mx.array(logits[1:]), [1], apart)
    assert first.token_ids.tolist() + second.token_ids.tolist() == sample(logits, together)


def test_resumed_request_continues():
    options = {
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 11,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
    }
    params = forbidding(["3 4", "9"], **options)

    def run(state: SamplingState, row: int, steps: range) -> list[int]:
        tokens = []
        for step in steps:
            logits = normal(1, seed=step)
            tokens += Sampler(VOCAB)(mx.array(logits), [row], state).token_ids.tolist()
        return tokens

    whole = SamplingState(3, VOCAB)
    whole.add(1, "a", params, [1, 2], [])
    expected = run(whole, 1, range(8))
    parts = SamplingState(3, VOCAB)
    parts.add(0, "a", params, [1, 2], [])
    begun = run(parts, 0, range(3))
    parts.remove(0)
    parts.add(2, "a", params, [1, 2], begun)
    assert begun + run(parts, 2, range(3, 8)) == expected


def test_seeded_rows_do_not_depend_on_their_neighbours():
    variants = [
        {"temperature": 0.7},
        {"temperature": 1.6, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 7, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 400},
    ]
    seeded = [{**options, "seed": 5} for options in variants]
    vocab = 4096
    logits = normal(len(seeded), vocab)
    batch = sample(logits, state_of(*seeded, vocab=vocab))
    alone = [sample(logits[i : i + 1], state_of(seeded[i], vocab=vocab))[0] for i in range(len(seeded))]
    assert batch == alone
    assert sample(logits, state_of(*seeded, vocab=vocab)) == batch


def test_nothing_is_read_back_between_steps():
    options = {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.5}
    chained, stepwise = state_of(options), state_of(options)
    sampler = Sampler(VOCAB)
    lazy = [sampler(mx.array(normal(1, seed=s)), [0], chained).token_ids for s in range(4)]
    eager = [sample(normal(1, seed=s), stepwise)[0] for s in range(4)]
    assert [tokens.item() for tokens in lazy] == eager


def test_moves_and_swaps_take_the_whole_request_along():
    options = [
        {"temperature": 1.0, "seed": row, "repetition_penalty": 1.0 + row / 4, "frequency_penalty": 0.3}
        for row in range(3)
    ]
    logits = normal(3)
    state = SamplingState(6, VOCAB)
    for row in range(3):
        state.add(row, str(row), SamplingParams(**options[row]), [1], [2])
    expected = sample(logits, state_of(*options, prompt=[1], output=[2]))
    state.move(0, 5)
    state.swap(1, 2)
    state.remove(0)
    tokens = Sampler(VOCAB)(mx.array(logits), [5, 2, 1], state).token_ids.tolist()
    assert tokens == expected


def test_allowed_token_ids_and_logit_bias():
    logits = normal(3)
    state = state_of(
        {"temperature": 0.0, "allowed_token_ids": [4, 9]}, {"temperature": 0.0, "logit_bias": {33: 100.0}}, GREEDY
    )
    best = max((4, 9), key=lambda token: logits[0, token])
    assert sample(logits, state) == [best, 33, logits[2].argmax()]


def test_bad_words_of_one_and_of_several_tokens():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [10, 11, 12]] = [9, 8, 7]
    params = forbidding(["10", "12 11", "12 12 11 3", "11 12 12"], temperature=0.0)
    state = SamplingState(1, VOCAB)
    state.add(0, "a", params, [12, 12], [])
    sampler = Sampler(VOCAB)
    boosts = [{}, {12: 5.0}, {}, {3: 20.0}, {12: 5.0}, {12: 6.0}]
    tokens = []
    for boost in boosts:
        step = logits.copy()
        for token, value in boost.items():
            step[0, token] += value
        tokens += sampler(mx.array(step), [0], state).token_ids.tolist()
    assert tokens == reference_bad_words(logits, params, boosts)


def reference_bad_words(logits, params, boosts) -> list[int]:
    output: list[int] = []
    for boost in boosts:
        row = logits[0].copy()
        for token, value in boost.items():
            row[token] += value
        for words in params.bad_words_token_ids:
            if len(words) <= len(output) + 1 and output[len(output) - len(words) + 1 :] == words[:-1]:
                row[words[-1]] = -np.inf
        output.append(int(row.argmax()))
    return output


def test_min_tokens_hold_stop_tokens_back_until_enough_were_emitted():
    logits = normal(1)
    logits[0, 50] = 40
    state = state_of({"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [50, 51]})
    sampler = Sampler(VOCAB)
    tokens = [sampler(mx.array(logits), [0], state).token_ids for _ in range(3)]
    assert [token.item() == 50 for token in tokens] == [False, False, True]


def test_a_finished_grammar_overrides_min_tokens():
    logits = normal(2)
    options = {"temperature": 0.0, "min_tokens": 5, "stop_token_ids": [50]}
    state = state_of({**options, "structured_outputs": StructuredOutputsParams(regex="a")}, options)
    bits = np.zeros((1, -(-VOCAB // 32)), np.int32)
    bits[0, 50 // 32] = 1 << (50 % 32)
    assert sample(logits, state, GrammarRows(np.array([0], np.int32), bits))[0] == 50


@pytest.mark.parametrize("kind", [mx.float16, mx.bfloat16, mx.float32])
def test_any_float_type_is_accepted(kind):
    logits = mx.array(normal(2)).astype(kind)
    state = state_of(GREEDY, {"temperature": 0.5, "top_p": 0.5, "seed": 1})
    tokens = Sampler(VOCAB)(logits, [0, 1], state).token_ids
    assert tokens.dtype == mx.int32
    assert tokens.tolist()[0] == mx.argmax(logits[0]).item()


def test_forbidding_everything_still_gives_a_token():
    logits = np.full((2, VOCAB), -np.inf, np.float32)
    tokens = sample(logits, state_of(GREEDY, {"temperature": 1.0, "top_p": 0.5}))
    assert all(0 <= token < VOCAB for token in tokens)
