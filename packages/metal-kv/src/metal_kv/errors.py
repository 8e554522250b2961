"""What can go wrong in cache memory, as one tree of exceptions.

::

    MetalKVError (a ValueError)
    ├── SpecError               a spec or a layout that cannot be stored
    ├── BlockTableError         a row or a block id outside a block table
    ├── OutOfBlocksError        the allocator has too few free blocks; nothing was changed
    └── NotEnoughMemoryError    the budget does not hold the cache
"""


class MetalKVError(ValueError):
    """Base class of every error this package raises on purpose."""


class SpecError(MetalKVError):
    """A cache spec or layout that the pool cannot store."""


class BlockTableError(MetalKVError):
    """A row or block id outside a block table."""


class OutOfBlocksError(MetalKVError):
    """The allocator has too few free blocks; it is unchanged."""


class NotEnoughMemoryError(MetalKVError):
    """The memory budget does not hold the cache that was asked for."""
