"""A decode program over the layers of a pool."""

from collections.abc import Sequence

import mlx.core as mx

from metal_kernels import target
from metal_kv.layer_cache import LayerCache
from metal_kv.pool import KVCachePool
from metal_models.compiled_step import CompiledStep
from metal_models.decode_program import DecodeProgram
from metal_models.step_rows import StepRows


def bound_step(program: DecodeProgram, caches: Sequence[LayerCache], *, compiled: bool) -> CompiledStep:
    """Bind ``program`` to the layers of its mixers, in their order; see :class:`CompiledStep`."""
    bare = [mixer for layer in program.layers for mixer in layer.caches("").values()]
    mixers = [mixer.bind(cache, in_place=compiled) for mixer, cache in zip(bare, caches, strict=True)]

    def rows(token_ids: mx.array, step: StepRows) -> mx.array:
        return program(token_ids, mixers, step)

    return CompiledStep(rows, [mixer.packer for mixer in mixers], caches, compiled=compiled)


def program_step(program: DecodeProgram | None, names: Sequence[str], pool: KVCachePool) -> CompiledStep | None:
    """Bind ``program`` to the model's layers ``names`` in ``pool``; None where kernels do not do all of it.

    Args:
        program: The model's layers.
        names: One for each layer that has caches; their names begin with it.
        pool: The pool.
    """
    if program is None or target() == "cpu" or len(names) != program.num_caches:
        return None
    mixers = program.caches(names)
    if not set(mixers) <= set(pool.layer_names):
        return None
    caches = {name: pool.layer(name) for name in mixers}
    if not all(mixer.served(caches[name]) for name, mixer in mixers.items()):
        return None
    return bound_step(program, list(caches.values()), compiled=True)
