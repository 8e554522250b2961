import random

import mlx.core as mx
import numpy as np
import pytest

from metal_kv import PrefixTree
from metal_models import MetalModelsError
from metal_models.contiguous import ContiguousModel, RequestRows, needs_state

FAMILIES = ["llama", "gpt_oss", "gemma3_text", "lfm2", "qwen3_next"]


class Serving:
    """Requests over a ContiguousModel, in ragged steps as a scheduler makes them."""

    def __init__(self, model, tree=None):
        self.model = model
        self.contiguous = ContiguousModel(model, tree)
        self.tokens, self.prompt_length, self.computed, self.salts = {}, {}, {}, {}
        self.rows = 0

    def add(self, req_id, prompt, salt=""):
        self.tokens[req_id], self.prompt_length[req_id] = list(prompt), len(prompt)
        self.computed[req_id], self.salts[req_id] = 0, salt

    def step(self, counts):
        requests, ids = [], []
        for req_id, count in counts.items():
            begin, known = self.computed[req_id], np.array(self.tokens[req_id], np.int32)
            requests.append(RequestRows(req_id, begin, begin + count, known, self.salts[req_id]))
            ids += self.tokens[req_id][begin : begin + count]
        hidden = self.contiguous.forward(mx.array(ids, mx.int32), requests)
        ends = np.cumsum(list(counts.values())) - 1
        chosen = self.contiguous.compute_logits(hidden[mx.array(ends)]).argmax(-1)
        mx.eval(chosen, self.contiguous.arrays())
        self.rows += int((np.abs(np.array(hidden)).sum(-1) > 0).sum())
        for (req_id, count), token in zip(counts.items(), chosen.tolist(), strict=True):
            self.computed[req_id] += count
            if self.computed[req_id] == len(self.tokens[req_id]):
                self.tokens[req_id].append(token)

    def output(self, req_id):
        return self.tokens[req_id][self.prompt_length[req_id] :]

    def finish(self, req_ids, new_tokens, chunk=5):
        waiting, running = list(req_ids), []
        while waiting or running:
            running += [waiting.pop(0)] if waiting else []
            self.step({r: min(chunk, len(self.tokens[r]) - self.computed[r]) for r in running})
            done = [r for r in running if len(self.output(r)) >= new_tokens]
            self.contiguous.forget(done)
            running = [r for r in running if r not in done]


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_requests_equal_mlx_lm(tiny, lab, name):
    model = tiny(name)
    serving = Serving(model)
    wanted = {str(i): prompt for i, prompt in enumerate(lab.prompts(model.vocab_size, (3, 13, 22, 1)))}
    for req_id, prompt in wanted.items():
        serving.add(req_id, prompt)
    serving.finish(wanted, 12)
    for req_id, prompt in wanted.items():
        assert serving.output(req_id)[:12] == lab.mlx_lm_tokens(model, prompt, 12)[0]
    assert serving.contiguous.num_requests == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_random_schedules_with_a_prefix_cache_equal_mlx_lm(tiny, lab, name):
    """Requests pause, start again, share prefixes and leave in random order; the tree is small."""
    model = tiny(name)
    rng = random.Random(5)
    tree = PrefixTree(60_000, needs_state=needs_state(model))
    serving = Serving(model, tree)
    base = lab.prompts(model.vocab_size, (30,))[0]
    wanted = {}
    for i in range(12):
        shared = base[: rng.choice([0, 7, 16, 30])]
        wanted[str(i)] = [*shared, *(rng.randrange(1, model.vocab_size) for _ in range(rng.randint(1, 9)))]
    wanted["again"] = wanted["3"]
    waiting, running, finished = list(wanted), [], []
    while waiting or running:
        if waiting and rng.random() < 0.5:
            req_id = waiting.pop(0)
            serving.add(req_id, wanted[req_id])
            running.append(req_id)
        chosen = [r for r in running if rng.random() < 0.8]
        rng.shuffle(chosen)
        if not chosen:
            continue
        serving.step({r: min(rng.randint(1, 20), len(serving.tokens[r]) - serving.computed[r]) for r in chosen})
        if rng.random() < 0.1:  # preempted: it starts again with all its tokens
            serving.contiguous.forget(chosen[:1])
            serving.computed[chosen[0]] = 0
        done = [r for r in running if len(serving.output(r)) >= 6]
        serving.contiguous.forget(done)
        finished += done
        running = [r for r in running if r not in done]
    assert len(finished) == len(wanted)
    for req_id, prompt in wanted.items():
        assert serving.output(req_id)[:6] == lab.mlx_lm_tokens(model, prompt, 6)[0], req_id
    assert tree.nbytes <= tree.max_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_a_known_prefix_is_not_computed_again(tiny, lab, name):
    model = tiny(name)
    tree = PrefixTree(1 << 26, needs_state=needs_state(model))
    serving = Serving(model, tree)
    first, second = lab.prompts(model.vocab_size, (60, 60))
    second[:50] = first[:50]
    third = [*first[:50], *reversed(second[50:])]
    computed = []
    for req_id, prompt in (("a", first), ("b", second), ("c", third), ("other", third)):
        serving.add(req_id, prompt, "tenant" if req_id == "other" else "")
        before = serving.rows
        serving.finish([req_id], 1, chunk=16)
        computed.append(serving.rows - before)
        assert serving.output(req_id) == lab.mlx_lm_tokens(model, prompt, 1)[0]
    # A state is first taken where two prompts part: the third one finds it.
    assert computed[1:] == ([60, 10, 60] if tree.needs_state else [10, 10, 60])


def test_requests_without_a_salt_share_nothing(tiny, lab):
    model = tiny("llama")
    tree = PrefixTree(1 << 26)
    serving = Serving(model, tree)
    prompt = lab.prompts(model.vocab_size, (30,))[0]
    for req_id in ("a", "b"):
        serving.add(req_id, prompt, None)
        serving.finish([req_id], 1)
    assert serving.rows == 60
    assert tree.nbytes == 0


def test_going_on_from_a_shared_prefix_changes_nobody_else(tiny, lab):
    model = tiny("llama")
    serving = Serving(model, PrefixTree(1 << 26))
    prompt = lab.prompts(model.vocab_size, (20,))[0]
    for req_id in "abc":
        serving.add(req_id, prompt)
        serving.finish([req_id], 8, chunk=32)
    assert serving.output("a") == serving.output("b") == serving.output("c")
    assert serving.output("a") == lab.mlx_lm_tokens(model, prompt, 8)[0]


def test_a_request_that_starts_in_the_middle_is_refused(tiny, lab):
    model = tiny("llama")
    serving = Serving(model)
    serving.add("a", [1, 2, 3])
    serving.computed["a"] = 1
    with pytest.raises(MetalModelsError, match="to have 1 tokens, got 0"):
        serving.step({"a": 2})
