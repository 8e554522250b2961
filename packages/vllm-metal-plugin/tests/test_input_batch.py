from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from vllm_metal_plugin.input_batch import InputBatch
from vllm_metal_plugin.sampling import PromptLogprobs, SamplingState
from vllm_metal_plugin.step_inputs import build_step_inputs

VOCAB = 100
Step = Callable[..., SchedulerOutput]


@pytest.fixture
def batch() -> InputBatch:
    return InputBatch(
        max_reqs=2,
        max_blocks=[8],
        sampling=SamplingState(2, VOCAB),
        new_prompt_logprobs=lambda length, k: PromptLogprobs(length, k, VOCAB, "raw_logprobs"),
    )


def new(req_id: str, prompt: Sequence[int], blocks: Sequence[int], computed: int = 0) -> NewRequestData:
    return NewRequestData(
        req_id=req_id,
        prompt_token_ids=list(prompt),
        mm_features=[],
        sampling_params=SamplingParams(temperature=0.0),
        pooling_params=None,
        block_ids=(list(blocks),),
        num_computed_tokens=computed,
        lora_request=None,
    )


def sample(batch: InputBatch, tokens: dict[str, int]) -> None:
    rows = np.array([batch.row_of[req_id] for req_id in tokens], np.int32)
    batch.record_sampled(rows, mx.array(list(tokens.values()), mx.int32))


def inputs_of(batch: InputBatch, scheduled: dict[str, int]) -> dict[str, list[int]]:
    inputs = build_step_inputs(batch, scheduled, [4])
    ids = np.array(inputs.token_ids).tolist()
    starts = inputs.query_start_loc
    return {r: ids[starts[i] : starts[i + 1]] for i, r in enumerate(inputs.req_ids)}


def test_prefill_then_decode_from_the_device(batch: InputBatch, step: Step) -> None:
    scheduled = {"a": 3}
    batch.update(step(scheduled, arriving=[new("a", [5, 6, 7], [1])]))
    inputs = build_step_inputs(batch, scheduled, [4])
    assert np.array(inputs.token_ids).tolist() == [5, 6, 7]
    assert inputs.emits.tolist() == [True]
    assert inputs.logits_indices.tolist() == [2]
    sample(batch, {"a": 42})
    batch.update(step({"a": 1}, computed={"a": 3}))
    assert inputs_of(batch, {"a": 1}) == {"a": [42]}


def test_partial_prefill_does_not_emit(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 2}, arriving=[new("a", [5, 6, 7], [1])]))
    assert build_step_inputs(batch, {"a": 2}, [4]).emits.tolist() == [False]
    batch.update(step({"a": 1}, computed={"a": 2}))
    inputs = build_step_inputs(batch, {"a": 1}, [4])
    assert inputs.emits.tolist() == [True]
    assert np.array(inputs.token_ids).tolist() == [7]


def test_decode_rows_come_first(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 3}, arriving=[new("a", [5, 6, 7], [1])]))
    sample(batch, {"a": 42})
    scheduled = {"b": 2, "a": 1}
    batch.update(step(scheduled, arriving=[new("b", [8, 9], [2])], computed={"a": 3}))
    inputs = build_step_inputs(batch, scheduled, [4])
    assert inputs.req_ids == ["a", "b"]
    assert inputs.query_start_loc.tolist() == [0, 1, 3]
    assert inputs.seq_lens.tolist() == [4, 2]
    assert np.array(inputs.token_ids).tolist() == [42, 8, 9]
    assert inputs.metadata[0].batch.num_decodes == 1
    assert np.array(inputs.metadata[0].positions).tolist() == [3, 0, 1]
    assert np.array(inputs.metadata[0].slot_mapping).tolist() == [7, 8, 9]


def test_rows_stay_dense(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 1, "b": 2}, arriving=[new("a", [3], [1]), new("b", [4, 5], [2])]))
    sample(batch, {"a": 11, "b": 12})
    batch.update(step({"b": 1}, computed={"b": 2}, finished=["a"]))
    assert batch.num_reqs == 1
    assert batch.row_of == {"b": 0}
    assert batch.block_tables[0].row(0).tolist() == [2]
    assert inputs_of(batch, {"b": 1}) == {"b": [12]}


def test_finished_and_unknown_ids_without_tokens(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 1}, arriving=[new("a", [3], [1])]))
    batch.update(step({}, finished=["a", "never seen"]))
    assert batch.num_reqs == 0
    assert batch.block_tables[0].row(0).tolist() == []


def test_prefix_hit_starts_after_the_computed_tokens(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 2}, arriving=[new("a", [3, 4, 5, 6, 7, 8], [9, 1], computed=4)]))
    inputs = build_step_inputs(batch, {"a": 2}, [4])
    assert np.array(inputs.token_ids).tolist() == [7, 8]
    assert np.array(inputs.metadata[0].slot_mapping).tolist() == [4, 5]


def test_preempted_request_resumes(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 2, "b": 1}, arriving=[new("a", [3, 4], [1]), new("b", [5], [2])]))
    sample(batch, {"a": 20, "b": 21})
    batch.update(step({"b": 1}, computed={"b": 1}, preempted=["a"]))
    assert list(batch.row_of) == ["b"]
    sample(batch, {"b": 22})
    batch.update(step({"b": 1, "a": 3}, computed={"b": 2, "a": 0}, resumed={"a": [3, 4, 20]}, blocks={"a": [7]}))
    inputs = build_step_inputs(batch, {"b": 1, "a": 3}, [4])
    assert np.array(inputs.token_ids).tolist() == [22, 3, 4, 20]
    assert inputs.emits.tolist() == [True, True]
    assert batch.block_tables[0].row(batch.row_of["a"]).tolist() == [7]


def test_preempted_and_resumed_in_one_step(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 2}, arriving=[new("a", [3, 4], [1])]))
    sample(batch, {"a": 20})
    batch.update(step({"a": 2}, computed={"a": 0}, preempted=["a"], resumed={"a": [3, 4]}, blocks={"a": [5]}))
    assert inputs_of(batch, {"a": 2}) == {"a": [3, 4]}
    assert batch.num_tokens[0] == 2


def test_same_id_again_replaces_the_request(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 2}, arriving=[new("a", [3, 4], [1])]))
    sample(batch, {"a": 20})
    batch.update(step({"a": 2}, arriving=[new("a", [3, 4, 20, 30, 31], [1, 2], computed=3)]))
    assert batch.num_reqs == 1
    assert inputs_of(batch, {"a": 2}) == {"a": [30, 31]}


def test_request_left_out_of_a_step_keeps_its_token(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 1, "b": 1}, arriving=[new("a", [3], [1]), new("b", [4], [2])]))
    sample(batch, {"a": 11, "b": 12})
    batch.update(step({"b": 1}, computed={"b": 1}))
    sample(batch, {"b": 13})
    batch.update(step({"a": 1, "b": 1}, computed={"a": 1, "b": 2}))
    assert inputs_of(batch, {"a": 1, "b": 1}) == {"a": [11], "b": [13]}


def test_new_blocks_are_appended(batch: InputBatch, step: Step) -> None:
    batch.update(step({"a": 4}, arriving=[new("a", [3, 4, 5, 6], [1])]))
    batch.update(step({"a": 1}, computed={"a": 4}, blocks={"a": [6]}))
    assert batch.block_tables[0].row(0).tolist() == [1, 6]


def test_more_requests_than_rows(batch: InputBatch, step: Step) -> None:
    arriving = [new(str(i), [i + 3], [i + 1]) for i in range(5)]
    scheduled = {str(i): 1 for i in range(5)}
    batch.update(step(scheduled, arriving=arriving))
    sample(batch, {str(i): 50 + i for i in range(5)})
    batch.update(step(scheduled, computed=dict.fromkeys(scheduled, 1)))
    assert inputs_of(batch, scheduled) == {str(i): [50 + i] for i in range(5)}
