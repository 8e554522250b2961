"""A model's own modules over the layers of a pool, compiled for steps of one row per request."""

import logging
from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import target
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.pool import KVCachePool
from metal_kv.spec import LatentSpec, RecurrentStateSpec
from metal_models.compiled_step import CompiledStep, NotCompiledError
from metal_models.decode_views import RowStep
from metal_models.few_row_modules import few_rows
from metal_models.head_split import HeadSplit
from metal_models.layer import Layer, all_specs
from metal_models.step_rows import StepRows

logger = logging.getLogger(__name__)


class ModuleStep(CompiledStep):
    """A model's modules bound to the layers of a pool.

    What the modules read of a step are arrays, or belongs to the sizes that a graph is compiled for. Where they look
    at values, or at what no kernel gives, steps of these sizes are left to the plain path.

    Args:
        model: The model.
        split: Its two halves.
        layers: What stands behind its caches, by name.
        pool: The pool.
        compiled: See :class:`CompiledStep`.

    Raises:
        NotCompiledError: No kernel does what a layer needs.
    """

    def __init__(
        self, model: nn.Module, split: HeadSplit, layers: Mapping[str, Layer], pool: KVCachePool, *, compiled: bool
    ) -> None:
        self._model = model
        self._split = split
        self._step = RowStep(in_place=compiled)
        self._views = [layer.decode_view(name, self._step, pool) for name, layer in layers.items()]
        caches = [pool.layer(name) for name in all_specs(layers, 1)]
        super().__init__(self._hidden, self._step.packers, caches, compiled=compiled)

    def serves(self, metadata: Sequence[AttentionMetadata]) -> bool:
        """Whether each request of the step has one row and goes on from earlier ones, and there are not too many."""
        return super().serves(metadata) and bool((metadata[0].batch.seq_lens > 1).all())

    def _hidden(self, token_ids: mx.array, rows: StepRows) -> mx.array:
        self._step.open(token_ids, rows)
        try:
            with few_rows(self._model):
                hidden = self._split.hidden(token_ids[:, None], list(self._views))
            return self._step.after_writes(hidden.squeeze(1))
        finally:
            self._step.end()


def module_step(
    model: nn.Module,
    split: HeadSplit,
    layers: Mapping[str, Layer],
    pool: KVCachePool,
    *,
    mla_kernel: bool = True,
    states: bool = False,
) -> ModuleStep | None:
    """Bind a model's modules to ``pool``; None where kernels do not do all of it, which the log says.

    Args:
        model: The model.
        split: Its two halves.
        layers: What stands behind its caches, by name.
        pool: The pool.
        mla_kernel: Whether latent attention may use its kernel.
        states: Whether layers may keep recurrent states.
    """
    if target() == "cpu":
        return None
    kinds = {type(spec) for spec in all_specs(layers, 1).values()}
    try:
        if LatentSpec in kinds and not mla_kernel:
            raise NotCompiledError("the kernel of latent attention is switched off")
        if RecurrentStateSpec in kinds and not states:
            raise NotCompiledError("that of recurrent states ran on no GPU yet; VLLM_METAL_COMPILED_DECODE=1 tries it")
        return ModuleStep(model, split, layers, pool, compiled=True)
    except NotCompiledError as error:
        logger.info("Decode steps run on the model's modules without being compiled: %s.", error)
        return None
