"""Who has which cache block: allocation, sharing, prefix caching and copy-on-write forks."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from metal_kv.errors import MetalKVError, OutOfBlocksError


def _block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + np.asarray(token_ids, np.int64).tobytes()).digest()


class BlockPool:
    """Reference-counted block ids with a prefix cache.

    A block that nobody holds is free. If its rows are known by hash it keeps them until it is needed
    for something else; the one unused longest goes first. Block 0, the null block, is never handed out.

    Invariants (``tests/test_block_pool.py``): free blocks plus held blocks are all blocks but the null
    block; a block that two sequences hold is never written; once every sequence is freed all reference
    counts are 0.

    Args:
        num_blocks: Blocks of the cache pool, the null block included.
        block_size: Tokens per block.
        prefix_caching: Whether blocks can be found again by what they hold.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise MetalKVError(
                f"[BlockPool] expected at least 2 blocks (block 0 is reserved) of at least 1 token, "
                f"got {num_blocks} of {block_size}. Use the numbers of the cache layout."
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._unknown = list(range(num_blocks - 1, 0, -1))  # free, with nothing worth keeping
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free, found by hash; the oldest first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out, cached ones included."""
        return len(self._unknown) + len(self._reusable)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by what they hold."""
        return len(self._hash_of)

    def ref_count(self, block_id: int) -> int:
        """Return how many sequences hold a block."""
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out blocks with reference count 1, forgetting the longest unused cached ones if need be.

        Raises:
            OutOfBlocksError: Too few are free; none is handed out.
        """
        if num_blocks > self.num_free:
            raise OutOfBlocksError(
                f"[BlockPool.allocate] expected at most {self.num_free} free blocks to be asked for, "
                f"got {num_blocks}. Free a sequence or use a larger pool."
            )
        block_ids = []
        for _ in range(num_blocks):
            if self._unknown:
                block_id = self._unknown.pop()
            else:
                block_id, _ = self._reusable.popitem(last=False)
                self._forget(block_id)
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def retain(self, block_ids: Sequence[int]) -> None:
        """Add one reference to each block; a free block must still be cached."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                if block_id not in self._reusable:
                    raise MetalKVError(
                        f"[BlockPool.retain] expected blocks that are held or cached, got block {block_id}. "
                        "Retain blocks before they are freed."
                    )
                del self._reusable[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference to each block, the last first: a prefix outlives its continuation."""
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise MetalKVError(
                    f"[BlockPool.free] expected blocks that are held, got block {block_id}. Free each block once."
                )
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if block_id in self._hash_of:
                    self._reusable[block_id] = None
                else:
                    self._unknown.append(block_id)

    def find(self, block_hash: bytes) -> int | None:
        """Return the block that holds the rows of this hash, if it is cached."""
        return self._block_of.get(block_hash)

    def remember(self, block_id: int, block_hash: bytes) -> None:
        """Make a held, full block findable; the first block of a hash stays the one that is found."""
        if self.prefix_caching and block_id not in self._hash_of and block_hash not in self._block_of:
            self._hash_of[block_id] = block_hash
            self._block_of[block_hash] = block_id

    def forget_all(self) -> None:
        """Empty the prefix cache, as after new weights were loaded."""
        self._unknown.extend(self._reusable)
        self._reusable.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def open(self, token_ids: Sequence[int], *, salt: str = "") -> "SequenceBlocks":
        """Start a sequence, holding the cached blocks of its longest known prefix.

        At least one token is left to compute, since its output is what the caller is after.

        Args:
            token_ids: The prompt; nothing is allocated for it until ``append``.
            salt: Sequences share blocks only under the same salt: a tenant, an adapter, an image.
        """
        parent = hashlib.sha256(salt.encode()).digest()
        block_ids: list[int] = []
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            block_hash = _block_hash(parent, token_ids[start : start + self.block_size])
            block_id = self.find(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
            parent = block_hash
        self.retain(block_ids)
        return SequenceBlocks(self, block_ids, parent, [])

    def _forget(self, block_id: int) -> None:
        del self._block_of[self._hash_of.pop(block_id)]


class SequenceBlocks:
    """The blocks of one sequence; made by ``BlockPool.open`` or ``fork``.

    Args:
        pool: Where the blocks come from.
        block_ids: Blocks in token order, one reference to each being this sequence's.
        last_hash: Hash of the last full block, or of the salt.
        tail: Tokens of the last, partly filled block.
    """

    def __init__(self, pool: BlockPool, block_ids: list[int], last_hash: bytes, tail: list[int]) -> None:
        self._pool = pool
        self._block_ids = block_ids
        self._last_hash = last_hash
        self._tail = tail
        self._num_full = len(block_ids) - bool(tail)
        self._open = True

    @property
    def block_ids(self) -> list[int]:
        """Blocks in token order: a row of the block table."""
        return list(self._block_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens whose rows are cached or will be after the next step."""
        return self._num_full * self._pool.block_size + len(self._tail)

    def append(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Make room for tokens whose rows the next step writes.

        Full blocks become findable at once: a sequence opened afterwards may read them in the same
        step or a later one.

        Returns:
            ``(source, destination)`` blocks to copy before that step, and before this pool is used
            again: a partly filled block shared with a fork is replaced by a copy.

        Raises:
            OutOfBlocksError: Too few blocks are free; nothing is changed.
        """
        self._check_open("append")
        pool, size = self._pool, self._pool.block_size
        if not token_ids:
            return []
        copies = bool(self._tail) and pool.ref_count(self._block_ids[-1]) > 1
        total_blocks = math.ceil((self.num_tokens + len(token_ids)) / size)
        new_blocks = pool.allocate(total_blocks - len(self._block_ids) + copies)
        pairs = []
        if copies:
            pairs.append((self._block_ids[-1], new_blocks[0]))
            pool.free(self._block_ids[-1:])
            self._block_ids[-1] = new_blocks.pop(0)
        self._block_ids.extend(new_blocks)
        self._tail.extend(token_ids)
        while len(self._tail) >= size:
            self._last_hash = _block_hash(self._last_hash, self._tail[:size])
            pool.remember(self._block_ids[self._num_full], self._last_hash)
            self._num_full += 1
            del self._tail[:size]
        return pairs

    def fork(self) -> "SequenceBlocks":
        """Return a second sequence that shares every block; each copies what it later changes."""
        self._check_open("fork")
        self._pool.retain(self._block_ids)
        return SequenceBlocks(self._pool, list(self._block_ids), self._last_hash, list(self._tail))

    def free(self) -> None:
        """Give the blocks back; the sequence cannot be used afterwards."""
        self._check_open("free")
        self._pool.free(self._block_ids)
        self._block_ids = []
        self._tail, self._num_full, self._open = [], 0, False

    def _check_open(self, operation: str) -> None:
        if not self._open:
            raise MetalKVError(
                f"[SequenceBlocks.{operation}] expected a sequence in use, got one that was freed. Open a new one."
            )
