"""Uniform numbers for each (request, output index), from a counter-based generator."""

import secrets

import numpy as np

BLOCK = 64
"""Output indices whose numbers are made at once for a request."""

NUMBERS = 8
"""Uniform numbers per output index; most draws use the first alone."""

_KEY_BITS = 128
_STEPS = 1 << 23


def request_key(seed: int | None, entropy: np.random.Generator | None = None) -> int:
    """Return the generator key of a request.

    Args:
        seed: The request's own seed, or None for a random key.
        entropy: Where random keys come from; None asks the operating system.
    """
    if seed is not None:
        return seed % (1 << 64)
    if entropy is None:
        return secrets.randbits(_KEY_BITS)
    return int.from_bytes(entropy.bytes(_KEY_BITS // 8), "little")


def uniform_block(key: int, block: int) -> np.ndarray:
    """Return float32 [BLOCK, NUMBERS]: the numbers of output indices ``block * BLOCK`` onwards.

    They lie strictly between 0 and 1, on the centres of 2**23 equal cells, so that float32 holds them
    exactly and neither end can round onto a token of probability zero.

    Source: Salmon et al., *Parallel random numbers: as easy as 1, 2, 3* (Philox).
    """
    generator = np.random.Philox(key=key, counter=block * (BLOCK * NUMBERS // 4))
    cells = generator.random_raw(BLOCK * NUMBERS).reshape(BLOCK, NUMBERS) >> np.uint64(41)
    return ((cells.astype(np.float64) + 0.5) / _STEPS).astype(np.float32)
