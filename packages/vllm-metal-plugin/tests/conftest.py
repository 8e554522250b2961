"""What most tests start from: a tiny model on disk, what mlx-lm makes of it, engines and scheduler outputs."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

VOCAB = 160
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 256,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_model(directory: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs.from_dict(CONFIG))
    rng = np.random.default_rng(0)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        scale = 0.25 if array.ndim > 1 else 1.0
        values = scale * rng.standard_normal(array.shape) if array.ndim > 1 else np.ones(array.shape)
        weights[name] = mx.array(values.astype(np.float32))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that vLLM, mlx-lm and transformers can read."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    _write_model(directory)
    _write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def mlx_lm_tokens(model_dir: Path) -> Callable[[Sequence[int], int], list[int]]:
    """Greedy tokens as mlx-lm itself generates them."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(model_dir)

    def generate(prompt: Sequence[int], max_tokens: int) -> list[int]:
        steps = generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens)
        return [int(token) for token, _ in steps]

    return generate


@pytest.fixture(scope="session")
def mlx_lm_logprobs(model_dir: Path) -> Callable[[Sequence[int]], np.ndarray]:
    """Log probabilities of the token after each position, as mlx-lm's model gives them."""
    from mlx_lm.utils import load_model

    model, _ = load_model(model_dir)

    def logprobs(token_ids: Sequence[int]) -> np.ndarray:
        logits = model(mx.array([list(token_ids)]))[0]
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return logprobs


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Callable[..., LLM]]":
    """Make engines that live in this process and end with the test.

    An engine collects garbage several times when it starts, among 700,000 objects of libraries: frozen, they cost
    nothing. When it ends it thaws and collects once more, which frees what an engine before it has left.
    """
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engines: list[LLM] = []

    def make(directory: Path, **options: Any) -> LLM:
        gc.freeze()
        engines.append(LLM(model=str(directory), **options))
        return engines[-1]

    yield make
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def step() -> "Callable[..., SchedulerOutput]":
    """Builds what the scheduler would say of one step."""
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

    def build(
        scheduled: dict[str, int],
        arriving: "Sequence[NewRequestData]" = (),
        computed: dict[str, int] | None = None,
        *,
        blocks: dict[str, list[int]] | None = None,
        resumed: dict[str, list[int]] | None = None,
        finished: Sequence[str] = (),
        preempted: Sequence[str] = (),
    ) -> SchedulerOutput:
        """Requests in ``computed`` were scheduled before; ``resumed`` has all token ids of those preempted since."""
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = scheduled
        output.total_num_scheduled_tokens = sum(scheduled.values())
        output.scheduled_new_reqs = list(arriving)
        computed, blocks = computed or {}, blocks or {}
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=list(computed),
            resumed_req_ids=set(resumed or ()),
            new_token_ids=[],
            all_token_ids=dict(resumed or {}),
            new_block_ids=[(blocks[req_id],) if req_id in blocks else None for req_id in computed],
            num_computed_tokens=list(computed.values()),
            num_output_tokens=[0] * len(computed),
        )
        output.finished_req_ids = set(finished)
        output.preempted_req_ids = set(preempted)
        return output

    return build
