"""Allocator, tables, slots and pages together: whatever the schedule, every sequence reads its own rows."""

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from metal_kernels import gather_kv_cache
from metal_kv import (
    AttentionMetadata,
    BlockPool,
    BlockTable,
    CacheGroup,
    CacheLayout,
    FullAttentionSpec,
    KVCachePool,
    OutOfBlocksError,
)

NUM_BLOCKS, BLOCK_SIZE, KERNEL_BLOCK_SIZE, MAX_SEQUENCES = 10, 6, 2, 6
SPEC = FullAttentionSpec(BLOCK_SIZE, 1, 4, dtype=mx.float32)
# Few different tokens: prefixes meet.
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)
pick = st.integers(0, 10**6)


def rows_of(token_ids, begin):
    """Keys of the rows from ``begin``: each depends on its token and on all before it, as a model's do."""
    state, rows = 1, []
    for token in token_ids:
        state = (state * 31 + token + 1) % 100_003
        rows.append([state, token, len(rows), 1])
    return np.array(rows, np.float32)[begin:, None]


class CacheUnderRandomSchedules(RuleBasedStateMachine):
    """Sequences open, grow, fork, leave, are preempted and resume in one small cache with kernel blocks."""

    def __init__(self):
        super().__init__()
        mx.set_default_device(mx.cpu)
        self.blocks = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        group = CacheGroup(("a", "b"), SPEC, kernel_block_size=KERNEL_BLOCK_SIZE)
        self.pool = KVCachePool(CacheLayout.from_groups([group], NUM_BLOCKS))
        self.table = BlockTable(MAX_SEQUENCES, NUM_BLOCKS, BLOCK_SIZE // KERNEL_BLOCK_SIZE)
        self.running = []
        self.preempted = []

    def step(self, wanted):
        """Write the rows of ``wanted``, a list of (sequence, its tokens, new ones), in one ragged batch."""
        batch = []
        for sequence, known, new in wanted:
            try:
                copies = sequence.append(new)
            except OutOfBlocksError:
                continue
            self.pool.copy_blocks(copies)
            batch.append((sequence, len(known), len(new)))
            known.extend(new)
        if not batch:
            return
        for row, (sequence, _, _) in enumerate(batch):
            self.table.add_row(row, sequence.block_ids)
        starts = np.cumsum([0, *(count for _, _, count in batch)])
        lens = [sequence.num_tokens for sequence, _, _ in batch]
        metadata = AttentionMetadata.build(starts, lens, self.table.rows(len(batch)), KERNEL_BLOCK_SIZE)
        slots = metadata.slot_mapping.tolist()
        assert min(slots) >= BLOCK_SIZE
        assert len(set(slots)) == len(slots)
        known_of = {id(sequence): known for sequence, known in self.running}
        keys = np.concatenate([rows_of(known_of[id(sequence)], begin) for sequence, begin, _ in batch])
        for name, sign in (("a", 1), ("b", -1)):
            self.pool.layer(name).write(mx.array(sign * keys), mx.array(2 * sign * keys), metadata)
        mx.eval(self.pool.arrays())

    def start(self, prompt, salt=""):
        sequence = self.blocks.open(prompt, salt=salt)
        known = prompt[: sequence.num_tokens]
        self.running.append((sequence, known))
        return sequence, known, prompt[len(known) :]

    @precondition(lambda self: len(self.running) < MAX_SEQUENCES)
    @rule(prompt=tokens, salt=st.sampled_from(["", "tenant"]))
    def open(self, prompt, salt):
        self.step([self.start(prompt, salt)])

    @precondition(lambda self: self.running)
    @rule(new=st.lists(tokens, min_size=1, max_size=MAX_SEQUENCES))
    def append(self, new):
        self.step([(*pair, more) for pair, more in zip(self.running, new, strict=False)])

    @precondition(lambda self: 0 < len(self.running) < MAX_SEQUENCES)
    @rule(which=pick)
    def fork(self, which):
        sequence, known = self.running[which % len(self.running)]
        self.running.append((sequence.fork(), list(known)))

    @precondition(lambda self: self.running)
    @rule(which=pick)
    def free(self, which):
        self.running.pop(which % len(self.running))[0].free()

    @precondition(lambda self: self.running)
    @rule(which=pick)
    def preempt(self, which):
        sequence, known = self.running.pop(which % len(self.running))
        sequence.free()
        self.preempted.append(known)

    @precondition(lambda self: self.preempted and len(self.running) < MAX_SEQUENCES)
    @rule()
    def resume(self):
        prompt = self.preempted.pop(0)
        if prompt:
            self.step([self.start(prompt)])

    @rule()
    def evict_and_poison(self):
        free = self.blocks.allocate(self.blocks.num_free)
        rows = [block * 3 + part for block in free for part in range(3)]
        for name in ("a", "b") if rows else ():
            mask = np.zeros(3 * NUM_BLOCKS, bool)
            mask[rows] = True
            poisoned = mx.array(mask[:, None, None, None, None])
            self.pool.layer(name).update(lambda pages, where=poisoned: mx.where(where, mx.nan, pages))
        mx.eval(self.pool.arrays())
        self.blocks.free(free)

    @invariant()
    def every_sequence_reads_its_own_rows(self):
        for sequence, known in self.running:
            if not known:
                continue
            expected = rows_of(known, 0)
            self.table.add_row(0, sequence.block_ids)
            row = mx.array(self.table.rows(1)[0])
            for name, sign in (("a", 1), ("b", -1)):
                keys, values = gather_kv_cache(self.pool.layer(name).kv_cache, row, len(known))
                np.testing.assert_array_equal(np.array(keys), sign * expected)
                np.testing.assert_array_equal(np.array(values), 2 * sign * expected)

    @invariant()
    def bytes_and_references_add_up(self):
        assert sum(array.nbytes for array in self.pool.arrays()) == self.pool.nbytes
        assert self.pool.nbytes == NUM_BLOCKS * 2 * SPEC.page_size_bytes
        held = [block for sequence, _ in self.running for block in sequence.block_ids]
        assert all(self.blocks.ref_count(block) == held.count(block) for block in range(NUM_BLOCKS))
        assert self.blocks.num_free == NUM_BLOCKS - 1 - len(set(held))
        assert not any(array[0].any().item() for array in self.pool.arrays())

    def teardown(self):
        for sequence, _ in self.running:
            sequence.free()
        assert all(self.blocks.ref_count(block) == 0 for block in range(NUM_BLOCKS))
        assert self.blocks.num_free == NUM_BLOCKS - 1


test_cache_under_random_schedules = CacheUnderRandomSchedules.TestCase
