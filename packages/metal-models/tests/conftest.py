"""Tiny random models and a small ragged scheduler to run them with."""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step

from metal_kv import unify_page_sizes
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.layout import CacheGroup, CacheLayout
from metal_kv.pool import KVCachePool
from metal_kv.spec import KVCacheSpec, RecurrentStateSpec
from metal_models import PagedModel
from metal_models.multimodal import MultimodalItem, RowEmbeddings, Towers
from metal_models.registry import build

CONFIGS = Path(__file__).parent / "configs"
BLOCK_SIZE = 4


def read_config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter: also the biases, gains and sinks that start at 0 or 1."""
    key = mx.random.key(seed)

    def value(name: str, array: mx.array) -> mx.array:
        nonlocal key
        key, use = mx.random.split(key)
        if not mx.issubdtype(array.dtype, mx.floating):
            return mx.random.randint(0, 2**31 - 1, array.shape, key=use).astype(array.dtype)
        noise = mx.random.normal(array.shape, key=use)
        if array.ndim < 2:
            return array + 0.2 * noise
        return noise * (1.5 / array.shape[-1] ** 0.5)

    module.update(tree_map_with_path(value, module.parameters()))
    mx.eval(module.parameters())
    return module


@pytest.fixture
def tiny() -> Callable[..., PagedModel]:
    """Build the tiny fp32 model of a config or of ``configs/<name>.json``, quantised on request."""

    def make(source: str | dict[str, Any], *, bits: int | None = None, **changes: Any) -> PagedModel:
        config = (read_config(source) if isinstance(source, str) else source) | changes
        module = randomise(build(config))
        if bits is not None:
            nn.quantize(module, group_size=32, bits=bits, class_predicate=_quantisable)
        module.eval()
        return PagedModel(module, config)

    return make


def _quantisable(_path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


@dataclass
class Request:
    """A sequence being served: its tokens so far and its blocks in every cache group."""

    tokens: list[int]
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    items: Sequence[Any] = ()


class Server:
    """Runs ragged steps of a model over a pool whose free blocks come in random order."""

    def __init__(self, model: PagedModel, num_blocks: int = 256) -> None:
        self.model = model
        self.groups = _groups(unify_page_sizes(model.kv_cache_specs(BLOCK_SIZE)))
        self.pool = KVCachePool(CacheLayout.from_groups(self.groups, num_blocks))
        self.free = list(range(1, num_blocks))
        random.Random(7).shuffle(self.free)

    def request(self, tokens: Sequence[int], shares: Request | None = None, shared_tokens: int = 0) -> Request:
        """Start a request, reading the first blocks of another one's cache if asked to."""
        blocks = [[] for _ in self.groups]
        if shares is not None:
            blocks = [
                list(table[: shared_tokens // group.block_size])
                for table, group in zip(shares.blocks, self.groups, strict=True)
            ]
        return Request(list(tokens), shared_tokens, blocks)

    def positions(self, work: Sequence[tuple[Request, int]]) -> np.ndarray | None:
        """Return the positions of a step's rows where they do not just count up."""
        return None

    def inputs(self, work: Sequence[tuple[Request, int]]) -> dict[str, Any]:
        """Return what the forward pass of a step takes beside tokens."""
        return {}

    def step(self, work: Sequence[tuple[Request, int]]) -> mx.array:
        """Compute the next ``n`` tokens of every request; append a greedy token where it was the last."""
        work = sorted(work, key=lambda item: item[1] > 1)
        for request, count in work:
            for table, group in zip(request.blocks, self.groups, strict=True):
                needed = -(-(request.computed + count) // group.block_size)
                table.extend(self.free.pop() for _ in range(needed - len(table)))
        starts = np.array([0, *itertools.accumulate(count for _, count in work)], np.int32)
        seq_lens = np.array([request.computed + count for request, count in work], np.int32)
        metadata = [
            AttentionMetadata.build(
                starts,
                seq_lens,
                _table([r.blocks[g] for r, _ in work]),
                group.block_size,
                keeps_rows=group.keeps_rows,
            )
            for g, group in enumerate(self.groups)
        ]
        positions = self.positions(work)
        if positions is not None:
            metadata = [own.at(positions) for own in metadata]
        ids = [t for r, n in work for t in r.tokens[r.computed : r.computed + n]]
        hidden = self.model.forward(mx.array(ids, mx.int32), metadata, self.pool, **self.inputs(work))
        logits = self.model.compute_logits(hidden[mx.array(starts[1:] - 1)])
        mx.eval(logits, *self.pool.arrays())
        logprobs = np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(mx.float32))
        for (request, count), row in zip(work, logprobs, strict=True):
            request.computed += count
            if request.computed == len(request.tokens):
                request.logprobs.append(row)
                request.tokens.append(int(row.argmax()))
        return hidden


class ItemServer(Server):
    """Gives each step what the images, videos and sounds of its requests call for, as an engine would."""

    def __init__(self, model: PagedModel, towers: Towers) -> None:
        super().__init__(model)
        self.towers = towers
        self.encoded: dict[int, mx.array] = {}

    def ask(self, tokens: Sequence[int], items: Sequence[MultimodalItem], **shared: Any) -> Request:
        """Start a request with items."""
        request = self.request(tokens, **shared)
        request.items = items
        return request

    def step(self, work: Sequence[tuple[Request, int]]) -> mx.array:
        """Compute a step in which no span of tokens that see each other is cut at its end."""
        return super().step([(request, self.whole(request, count)) for request, count in work])

    def coordinates(self, request: Any) -> np.ndarray | None:
        """Return the request's M-RoPE positions, those of generated tokens included."""
        generated = len(request.logprobs)
        prompt = np.array(request.tokens[: len(request.tokens) - generated], np.int32)
        found = self.towers.rope_positions(prompt, request.items)
        if found is None:
            return None
        later = np.arange(len(prompt), len(request.tokens), dtype=np.int32) + found[1]
        return np.concatenate([found[0], np.broadcast_to(later, (3, generated))], axis=1)

    def embeddings(self, request: Any, count: int) -> tuple[list[int], list[mx.array]]:
        """Return which of a request's next rows take embeddings, and these."""
        rows, values = [], []
        for item in request.items:
            if id(item) not in self.encoded:
                self.encoded[id(item)] = self.towers.encode(item)
            places = item.embed_positions - request.computed
            wanted = np.flatnonzero((places >= 0) & (places < count))
            if len(wanted):
                rows += places[wanted].tolist()
                values.append(self.encoded[id(item)][mx.array(wanted)])
        return rows, values

    def spans(self, request: Any, count: int) -> list[tuple[int, int]]:
        """Return which of a request's next rows see each other."""
        places = [span for item in request.items for span in self.towers.spans(item)]
        rows = [(max(0, first - request.computed), min(count, end - request.computed)) for first, end in places]
        return [(first, end) for first, end in rows if first < end]

    def whole(self, request: Any, count: int) -> int:
        """Return how many rows to compute so that no span is cut at its end."""
        for item in request.items:
            for first, end in self.towers.spans(item):
                if first < request.computed + count < end:
                    return end - request.computed
        return count

    def inputs(self, work: Any) -> dict[str, Any]:
        rows, values, spans, turns, at = [], [], [], [], 0
        for request, count in work:
            own, parts = self.embeddings(request, count)
            rows += [at + row for row in own]
            values += parts
            spans += [(at + first, at + end) for first, end in self.spans(request, count)]
            turns.append(self.coordinates(request))
            turns[-1] = None if turns[-1] is None else turns[-1][:, request.computed : request.computed + count]
            at += count
        given: dict[str, Any] = {"bidirectional": spans}
        if rows:
            given["embeddings"] = RowEmbeddings(np.array(rows, np.int32), mx.concatenate(values))
        if turns[0] is not None and at > len(work):
            given["rope_positions"] = mx.array(np.concatenate(turns, axis=1))
        return given

    def positions(self, work: Any) -> np.ndarray | None:
        """Return where the rows of a step of one row each are in time, height and width alike."""
        found = [self.coordinates(request) for request, _ in work]
        if found[0] is None or any(count > 1 for _, count in work):
            return None
        return np.array([own[0, r.computed] for own, (r, _) in zip(found, work, strict=True)], np.int32)


def _groups(specs: dict[str, KVCacheSpec]) -> list[CacheGroup]:
    """Put layers of one kind into one group, or all layers where pages of different bytes cannot share slabs."""
    by_kind: dict[Any, dict[str, KVCacheSpec]] = {}
    for name, spec in specs.items():
        by_kind.setdefault((type(spec), getattr(spec, "window", None)), {})[name] = spec
    if len({spec.page_size_bytes for spec in specs.values()}) > 1:
        by_kind = {None: specs}
    return [CacheGroup(tuple(layers), tuple(layers.values())) for layers in by_kind.values()]


def _table(tables: list[list[int]]) -> np.ndarray:
    width = max(len(table) for table in tables)
    return np.array([table + [0] * (width - len(table)) for table in tables], np.int32)


def serve_mixed(server: Server, requests: Sequence[Request], new_tokens: int, chunk: int) -> None:
    """Let requests join one by one, prefill in chunks beside others' decode rows, and leave when done."""
    waiting, running = list(requests), []
    while waiting or running:
        if waiting:
            running.append(waiting.pop(0))
        server.step([(request, min(chunk, len(request.tokens) - request.computed)) for request in running])
        running = [request for request in running if len(request.logprobs) < new_tokens]


def mlx_lm_tokens(model: PagedModel, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
    """Generate greedily with mlx-lm itself; return tokens and log-probabilities ``[count, vocab]``."""
    tokens, rows = [], []
    for token, logprobs in generate_step(mx.array(prompt), model.module, max_tokens=count):
        tokens.append(int(token))
        rows.append(np.array(logprobs.astype(mx.float32)))
    return tokens, np.stack(rows)


def decode_pool(model: PagedModel, block_size: int = BLOCK_SIZE) -> tuple[KVCachePool, list[CacheGroup]]:
    """Return a pool with blocks for three requests in each of two groups, and its groups."""
    specs = unify_page_sizes(model.kv_cache_specs(block_size), state_block_size=block_size)
    by_kind: dict[Any, dict[str, KVCacheSpec]] = {}
    alike = len({spec.page_size_bytes for spec in specs.values()}) == 1
    for name, spec in specs.items():
        kind = (type(spec), spec.block_size, getattr(spec, "window", None))
        by_kind.setdefault(kind if alike else (), {})[name] = spec
    groups = []
    for layers in by_kind.values():
        rows = not isinstance(next(iter(layers.values())), RecurrentStateSpec)
        groups.append(CacheGroup(tuple(layers), tuple(layers.values()), block_size if rows else None))
    return KVCachePool(CacheLayout.from_groups(groups, 1 + 36 * len(groups))), groups


def decode_metadata(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    groups: Sequence[CacheGroup],
    requests: Sequence[int] = (0, 1, 2),
) -> list[AttentionMetadata]:
    """Give each request blocks of its own in every group, in an order of no meaning."""
    starts = np.array([0, *itertools.accumulate(query_lens)], np.int32)
    blocks = np.random.default_rng(1).permutation(36 * len(groups)).astype(np.int32) + 1
    return [
        AttentionMetadata.build(
            starts,
            np.array(seq_lens),
            table[list(requests)],
            group.block_size,
            kernel_block_size=group.kernel_block_size,
            keeps_rows=group.keeps_rows,
        )
        for table, group in zip(blocks.reshape(len(groups), 3, 12), groups, strict=True)
    ]


def check_decode(model: PagedModel, pool: KVCachePool, step: Any, steps: int = 9, tolerance: float = 2e-3) -> None:
    """Decode after three prompts by ``step`` over ``pool`` and by the plain path over another one; compare all rows.

    Contexts grow over the ends of blocks; in the last steps the second request has left.
    """
    plain_pool, groups = decode_pool(model)
    prompts, seq_lens = [5, 1, 14], np.array([5, 1, 14])
    ids = mx.array(np.random.default_rng(0).integers(1, model.vocab_size, sum(prompts)), mx.int32)
    metadata = decode_metadata(prompts, seq_lens, groups)
    assert not step.serves(metadata)
    last = mx.array(np.cumsum(prompts) - 1)
    tokens = []
    for cache in (plain_pool, pool):
        logits = model.compute_logits(model.forward(ids, metadata, cache)[last])
        mx.eval(logits, cache.arrays())
        tokens.append(mx.argmax(logits, axis=-1).astype(mx.int32))
    requests = [0, 1, 2]
    for index in range(steps):
        if index == steps - 2:
            requests, tokens = [0, 2], [ids[mx.array([0, 2])] for ids in tokens]
        seq_lens += 1
        metadata = decode_metadata([1] * len(requests), seq_lens[requests], groups, requests)
        assert step.serves(metadata)
        hidden = [model.forward(tokens[0], metadata, plain_pool), step(tokens[1], metadata)]
        mx.eval(hidden, plain_pool.arrays(), pool.arrays())
        np.testing.assert_allclose(*hidden, rtol=tolerance, atol=tolerance)
        tokens = [mx.argmax(model.compute_logits(rows), axis=-1).astype(mx.int32) for rows in hidden]
        assert tokens[0].tolist() == tokens[1].tolist()


def prompts(vocab_size: int, lengths: Sequence[int] = (3, 13, 22)) -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(1, vocab_size) for _ in range(length)] for length in lengths]


@pytest.fixture
def lab() -> SimpleNamespace:
    """What tests of generation share: test modules cannot import this file."""
    return SimpleNamespace(
        ItemServer=ItemServer,
        Server=Server,
        block_size=BLOCK_SIZE,
        check_decode=check_decode,
        decode_metadata=decode_metadata,
        decode_pool=decode_pool,
        mlx_lm_tokens=mlx_lm_tokens,
        prompts=prompts,
        read_config=read_config,
        serve_mixed=serve_mixed,
    )
