"""Which layers share which slab of cache memory, and how many bytes that takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from metal_kv.errors import SpecError
from metal_kv.spec import AttentionSpec, KVCacheSpec, LatentSpec, RecurrentStateSpec, with_block_size

_MAX_SLOTS = 2**31 - 1


@dataclass(frozen=True)
class CacheGroup:
    """Layers that use one block table.

    Attributes:
        layer_names: Names of the layers, unique in the model.
        spec: What every layer of the group keeps, or one spec for each layer (same block size).
        kernel_block_size: Tokens per block as kernels see them, when smaller than the block size in which
            memory is allocated; an allocated block is then several consecutive kernel blocks.
    """

    layer_names: tuple[str, ...]
    spec: KVCacheSpec | tuple[KVCacheSpec, ...]
    kernel_block_size: int | None = None

    def __post_init__(self) -> None:
        if not self.layer_names or len(self.specs) != len(self.layer_names):
            raise SpecError(
                f"[CacheGroup] expected one spec, or one for each of at least one layer, got "
                f"{len(self.specs)} specs for {len(self.layer_names)} layers. Name each layer once."
            )
        sizes = {spec.block_size for spec in self.specs}
        if len(sizes) > 1:
            raise SpecError(
                f"[CacheGroup] expected one block size in a group, got {sorted(sizes)}. "
                "Layers with different block sizes need groups of their own."
            )
        if self.kernel_block_size is not None:
            self._check_kernel_block_size(self.kernel_block_size)

    def _check_kernel_block_size(self, kernel_block_size: int) -> None:
        if kernel_block_size < 1 or self.block_size % kernel_block_size:
            raise SpecError(
                f"[CacheGroup] expected a kernel_block_size that divides {self.block_size}, "
                f"got {kernel_block_size}. Choose a divisor of the block size."
            )
        if not all(isinstance(spec, AttentionSpec | LatentSpec) for spec in self.specs):
            raise SpecError(
                f"[CacheGroup] expected no kernel_block_size for states, as they cannot be cut, "
                f"got {kernel_block_size}. Leave it out for recurrent layers."
            )

    @property
    def specs(self) -> tuple[KVCacheSpec, ...]:
        """The spec of every layer, in layer order."""
        return self.spec if isinstance(self.spec, tuple) else (self.spec,) * len(self.layer_names)

    @property
    def block_size(self) -> int:
        """Tokens per allocated block."""
        return self.specs[0].block_size

    @property
    def kernel_blocks_per_block(self) -> int:
        """Blocks as kernels see them that make up an allocated one."""
        return self.block_size // (self.kernel_block_size or self.block_size)

    @property
    def keeps_rows(self) -> bool:
        """Whether every token has a slot of its own in a block; states have none."""
        return not all(isinstance(spec, RecurrentStateSpec) for spec in self.specs)

    def max_blocks_per_request(self, num_tokens: int, max_in_flight_tokens: int = 0) -> int:
        """Blocks that one request of ``num_tokens`` holds in this group at its fullest."""
        return max(spec.max_blocks_per_request(num_tokens, max_in_flight_tokens) for spec in self.specs)


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer's pages are.

    Attributes:
        group: Index of the layer's group, which is also the index of its block table and metadata.
        slab: Index of the slab its pages lie in.
        spec: What the layer keeps per allocated block.
        view_shape: Shape of the slab as kernels see it for this layer.
    """

    group: int
    slab: int
    spec: KVCacheSpec
    view_shape: tuple[int, ...]


def slab_page_sizes(groups: Sequence[CacheGroup]) -> tuple[int, ...]:
    """Return the page bytes of every slab: slab ``i`` serves the i-th layer of every group.

    Raises:
        SpecError: Two layers that share a slab have pages of different bytes.
    """
    sizes: list[int] = []
    owners: list[str] = []
    for group in groups:
        for index, (name, spec) in enumerate(zip(group.layer_names, group.specs, strict=True)):
            if spec.page_size_bytes % 4:
                raise SpecError(
                    f"[CacheLayout] expected pages of a multiple of 4 bytes, got {spec.page_size_bytes} "
                    f"for layer {name!r}. Use an even block size or a padded page."
                )
            if index == len(sizes):
                sizes.append(spec.page_size_bytes)
                owners.append(name)
            elif sizes[index] != spec.page_size_bytes:
                raise SpecError(
                    f"[CacheLayout] expected pages of {sizes[index]} bytes as layer {owners[index]!r} of "
                    f"the same slab has, got {spec.page_size_bytes} bytes for layer {name!r}. "
                    "Scale the block size of one group, or pad its recurrent states, until they are equal."
                )
    return tuple(sizes)


def bytes_per_block(groups: Sequence[CacheGroup]) -> int:
    """Return the bytes one block id takes over all slabs."""
    return sum(slab_page_sizes(groups))


def max_blocks_per_request(groups: Sequence[CacheGroup], num_tokens: int, max_in_flight_tokens: int = 0) -> int:
    """Return the blocks that one request of ``num_tokens`` holds over all groups at its fullest.

    Groups take their block ids from the same pool, so their needs add up.
    """
    return sum(group.max_blocks_per_request(num_tokens, max_in_flight_tokens) for group in groups)


@dataclass(frozen=True)
class CacheLayout:
    """Slabs of ``num_blocks`` pages, shared by the groups; block 0 is the null block and never holds data.

    A block id belongs to one group at a time, so groups can use the same bytes. Made by ``from_groups``.

    Invariants (``tests/test_layout.py``): every layer has one place; the slabs' bytes add up to ``nbytes``;
    every view covers its slab exactly.
    """

    groups: tuple[CacheGroup, ...]
    num_blocks: int
    page_sizes: tuple[int, ...]

    @classmethod
    def from_groups(cls, groups: Sequence[CacheGroup], num_blocks: int) -> "CacheLayout":
        """Lay ``num_blocks`` blocks, the null block included, out for ``groups``.

        Raises:
            SpecError: No group, a layer named twice, pages of different bytes in a slab, or a number of
                blocks that holds no data or that 32-bit slots cannot address.
        """
        groups = tuple(groups)
        names = [name for group in groups for name in group.layer_names]
        if not names or len(names) != len(set(names)):
            raise SpecError(
                f"[CacheLayout] expected at least one layer and every layer once, got {names}. "
                "Put each layer into exactly one group."
            )
        most_blocks = _MAX_SLOTS // max((group.block_size for group in groups if group.keeps_rows), default=1)
        if not 2 <= num_blocks <= most_blocks:
            raise SpecError(
                f"[CacheLayout] expected 2 to {most_blocks} blocks (block 0 is reserved; slots are 32-bit), "
                f"got {num_blocks}. Change the memory budget or the block size."
            )
        return cls(groups, num_blocks, slab_page_sizes(groups))

    @property
    def num_slabs(self) -> int:
        """Number of slabs: the layers of the largest group."""
        return len(self.page_sizes)

    @property
    def bytes_per_block(self) -> int:
        """Bytes one block id takes over all slabs."""
        return sum(self.page_sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return self.bytes_per_block * self.num_blocks

    def places(self) -> dict[str, LayerPlace]:
        """Return the place of every layer by name."""
        return {
            name: LayerPlace(group_index, slab_index, spec, self._view_shape(group, spec))
            for group_index, group in enumerate(self.groups)
            for slab_index, (name, spec) in enumerate(zip(group.layer_names, group.specs, strict=True))
        }

    def _view_shape(self, group: CacheGroup, spec: KVCacheSpec) -> tuple[int, ...]:
        if group.kernel_block_size is None:
            return (self.num_blocks, *spec.page_shape)
        ratio = spec.block_size // group.kernel_block_size
        return (self.num_blocks * ratio, *with_block_size(spec, group.kernel_block_size).page_shape)
