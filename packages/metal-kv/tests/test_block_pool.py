import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from metal_kv import BlockPool, MetalKVError, OutOfBlocksError

NUM_BLOCKS, BLOCK_SIZE = 12, 3
# Few different tokens: prefixes meet.
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=10)
pick = st.integers(0, 10**6)


class PoolAgainstMemory(RuleBasedStateMachine):
    """Plays the cache: block contents are lists, a step writes them, reads must give each sequence its own."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.memory = {block: [None] * BLOCK_SIZE for block in range(NUM_BLOCKS)}
        self.sequences = []

    def extend(self, sequence, known, new):
        before = (sequence.block_ids, self.pool.num_free)
        try:
            pairs = sequence.append(new)
        except OutOfBlocksError:
            assert (sequence.block_ids, self.pool.num_free) == before
            return
        for source, destination in pairs:
            self.memory[destination] = list(self.memory[source])
        for position, token in enumerate(new, len(known)):
            block = sequence.block_ids[position // BLOCK_SIZE]
            assert self.pool.ref_count(block) == 1, "a shared block is written"
            self.memory[block][position % BLOCK_SIZE] = token
        known += new

    @rule(prompt=tokens, salt=st.sampled_from(["", "tenant"]))
    def open(self, prompt, salt):
        sequence = self.pool.open(prompt, salt=salt)
        known = prompt[: sequence.num_tokens]
        assert len(known) < len(prompt)
        self.sequences.append((sequence, known))
        self.extend(sequence, known, prompt[len(known) :])

    @precondition(lambda self: self.sequences)
    @rule(which=pick, new=tokens)
    def append(self, which, new):
        sequence, known = self.sequences[which % len(self.sequences)]
        self.extend(sequence, known, new)

    @precondition(lambda self: self.sequences)
    @rule(which=pick)
    def fork(self, which):
        sequence, known = self.sequences[which % len(self.sequences)]
        self.sequences.append((sequence.fork(), list(known)))

    @precondition(lambda self: self.sequences)
    @rule(which=pick)
    def free(self, which):
        sequence, _ = self.sequences.pop(which % len(self.sequences))
        sequence.free()
        assert sequence.block_ids == []

    @rule()
    def evict(self):
        block_ids = self.pool.allocate(self.pool.num_free)
        assert self.pool.num_free == 0
        self.pool.free(block_ids)

    @rule()
    def forget_all(self):
        self.pool.forget_all()
        assert self.pool.num_cached == 0

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, known in self.sequences:
            assert sequence.num_tokens == len(known)
            rows = [row for block in sequence.block_ids for row in self.memory[block]]
            assert rows[: len(known)] == known

    @invariant()
    def references_are_those_of_the_sequences(self):
        held = [block for sequence, _ in self.sequences for block in sequence.block_ids]
        assert 0 not in held
        assert all(self.pool.ref_count(block) == held.count(block) for block in range(NUM_BLOCKS))
        assert self.pool.num_free == NUM_BLOCKS - 1 - len(set(held))

    def teardown(self):
        for sequence, _ in self.sequences:
            sequence.free()
        assert all(self.pool.ref_count(block) == 0 for block in range(NUM_BLOCKS))
        assert self.pool.num_free == NUM_BLOCKS - 1
        assert sorted(self.pool.allocate(NUM_BLOCKS - 1)) == list(range(1, NUM_BLOCKS))


test_pool_under_random_schedules = PoolAgainstMemory.TestCase


def filled(pool, prompt, salt=""):
    sequence = pool.open(prompt, salt=salt)
    sequence.append(prompt[sequence.num_tokens :])
    return sequence


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=30))
def test_a_prompt_finds_all_but_its_last_token_again(prompt):
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    first = filled(pool, prompt)
    blocks = first.block_ids
    first.free()
    again = pool.open(prompt)
    assert again.num_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert again.block_ids == blocks[: again.num_tokens // BLOCK_SIZE]


def test_a_block_is_found_only_behind_the_same_prefix_and_salt():
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    filled(pool, [1, 2, 3, 4, 5, 6, 7])
    assert pool.open([1, 2, 3, 4, 5, 6, 7]).num_tokens == 6
    assert pool.open([9, 2, 3, 4, 5, 6, 7]).num_tokens == 0
    assert pool.open([1, 2, 3, 4, 5, 9, 7]).num_tokens == 3
    assert pool.open([1, 2, 3, 4, 5, 6, 7], salt="tenant").num_tokens == 0


def test_the_longest_unused_prefix_is_evicted_first_from_its_end():
    pool = BlockPool(5, 1)
    old, new = filled(pool, [1, 2]), filled(pool, [3, 4])
    new_blocks = new.block_ids
    old.free()
    new.free()
    pool.open([1, 2, 0]).free()  # used again, so [3, 4] is now the oldest
    assert pool.allocate(1) == new_blocks[1:]
    assert pool.open([3, 4, 0]).num_tokens == 1
    assert pool.open([1, 2, 0]).num_tokens == 2


def test_a_fork_copies_only_a_partly_filled_block_and_only_once():
    pool = BlockPool(NUM_BLOCKS, 4)
    parent = filled(pool, [1, 2, 3, 4, 5])
    child = parent.fork()
    assert child.block_ids == parent.block_ids
    shared = parent.block_ids[1]
    assert child.append([6]) == [(shared, child.block_ids[1])]
    assert parent.append([7]) == []
    assert parent.block_ids[0] == child.block_ids[0]
    full = filled(pool, [8, 8, 8, 8])
    assert full.fork().append([1]) == []


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, prefix_caching=False)
    filled(pool, [1, 2, 3, 4])
    assert pool.open([1, 2, 3, 4]).num_tokens == 0
    assert pool.num_cached == 0


def test_too_many_blocks_are_refused_and_none_is_taken():
    pool = BlockPool(4, 2)
    with pytest.raises(OutOfBlocksError, match="at most 3 free blocks to be asked for, got 4"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_misuse_is_refused():
    pool = BlockPool(4, 2)
    sequence = filled(pool, [1])
    sequence.free()
    for misuse in (
        lambda: pool.free([1]),
        lambda: pool.retain([1]),
        sequence.free,
        sequence.fork,
        lambda: sequence.append([1]),
        lambda: BlockPool(1, 16),
    ):
        with pytest.raises(MetalKVError, match="expected"):
            misuse()
