"""An mlx-lm model whose forward pass is a ragged batch of token rows over a paged cache."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int32
from mlx.utils import tree_flatten

from metal_kernels import target
from metal_kv.attention_metadata import AttentionMetadata
from metal_kv.pool import KVCachePool
from metal_kv.spec import KVCacheSpec
from metal_models.cache_view import Step
from metal_models.compiled_step import CompiledStep
from metal_models.decode_families import decode_program
from metal_models.head_split import HeadSplit
from metal_models.layer import all_specs
from metal_models.lora import LoraLayers
from metal_models.module_step import module_step
from metal_models.program_step import program_step
from metal_models.quantized_heads import speed_up_heads
from metal_models.registry import architecture_of
from metal_models.row_inputs import RowEmbeddings, RowInputs, rope_sections
from metal_models.row_projections import multiply_rows_together
from metal_models.spans import Spans
from metal_models.tracing import trace


class PagedModel:
    """A loaded model.

    Args:
        module: An mlx-lm model made by ``metal_models`` (see ``registry.model_classes``).
        config: As in the model's ``config.json``.
        compiled_decode: Whether steps of one row per request are compiled: as a program of fused kernels, where the
            model and the device have one, or else on the model's own modules. With False all steps run on these as
            they come; with None those of modules with recurrent states do, whose compiled form ran in the simulator
            but on no GPU yet.
        mla_kernel: Whether latent attention may use the GPU kernel; else it is plain MLX over gathered rows.
        gdn_kernel: Whether decode steps of gated delta nets may use the GPU kernel; else they run on the model's own
            modules.

    Attributes:
        module: The model.
        config: The config.
        vocab_size: Width of the logits; padding of the vocabulary included.
        hidden_size: Width of a hidden row.
        dtype: Of hidden rows.
        nbytes: Size of the parameters.
        lora: Its LoRA adapters; a step of rows that use some is computed within ``lora.applied``.

    Raises:
        UnsupportedModelError: A layer asks for something the paged cache does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        *,
        compiled_decode: bool | None = None,
        mla_kernel: bool = True,
        gdn_kernel: bool = True,
    ) -> None:
        self.module = module
        self.config = config
        multiply_rows_together(module)
        speed_up_heads(module)
        self._split = HeadSplit(module)
        self._trace = trace(module, self._split, architecture_of(config))
        self.vocab_size = self._trace.vocab_size
        self.hidden_size = self._trace.hidden_size
        self.dtype = self._trace.dtype
        self.nbytes = sum(array.nbytes for _, array in _leaves(module))
        self._compiled_decode = False if target() == "cpu" else compiled_decode
        self._program = None
        if self._compiled_decode is not False:
            self._program = decode_program(module, gdn_kernel=gdn_kernel, mla_kernel=mla_kernel)
        self._decode_step: CompiledStep | None = None
        self.lora = LoraLayers(module, self.dtype)
        self._row_inputs = RowInputs(module, self.hidden_size, rope_sections(config))
        self._mla_kernel = mla_kernel
        self._step = Step()
        self._views: list[Any] = []
        self._pool: KVCachePool | None = None

    def kv_cache_specs(self, block_size: int) -> dict[str, KVCacheSpec]:
        """Return what each layer stores, by name, in layer order."""
        return all_specs(self._trace.layers, block_size)

    def forward(
        self,
        token_ids: Int32[mx.array, "tokens"],
        metadata: Sequence[AttentionMetadata],
        pool: KVCachePool,
        *,
        embeddings: RowEmbeddings | None = None,
        rope_positions: Int32[mx.array, "3 tokens"] | None = None,
        bidirectional: Sequence[tuple[int, int]] = (),
    ) -> Float[mx.array, "tokens hidden"]:
        """Write the step's keys and values to ``pool`` and return its hidden rows, lazily.

        Args:
            token_ids: Ids of all rows of the step, request by request.
            metadata: One per cache group of the pool; all describe the same rows.
            pool: A pool laid out for ``kv_cache_specs``; its arrays are to be evaluated with the
                result (``pool.arrays()``). Views of the latest pool are kept for the next step.
            embeddings: What some rows take in place of their token's embedding.
            rope_positions: Time, height and width of every row, for models that turn heads by three coordinates
                (M-RoPE). Where the three are equal in all rows, give the metadata these positions instead
                (``AttentionMetadata.at``): decode steps then stay compiled.
            bidirectional: Ranges of rows that see each other, later ones too, each within one request: the embeddings
                of an item, for towers that say so. Rows of a range that earlier steps computed did not see these.

        Raises:
            MetalModelsError: The model cannot take the embeddings or the rope positions.
        """
        if pool is not self._pool:
            self._bind(pool)
        plain = embeddings is None and rope_positions is None and not bidirectional and not self.lora.active
        if self._decode_step is not None and plain and self._decode_step.serves(metadata):
            rows = self._decode_step(token_ids, metadata)
            if rows is not None:
                return rows
        self._step.begin(metadata, Spans.of(bidirectional, architecture_of(self.config)), plain=plain)
        try:
            with self._row_inputs.applied(self._step.positions, embeddings, rope_positions):
                ids = self._row_inputs.without_tokens(token_ids, embeddings)
                hidden = self._split.hidden(ids[:, None], list(self._views))
        finally:
            self._step.end()
        return hidden.squeeze(1)

    def compute_logits(self, hidden: Float[mx.array, "rows hidden"]) -> Float[mx.array, "rows vocab"]:
        """Apply the model's own head, soft-capping and scaling included, to some hidden rows."""
        return self._split.logits(hidden[:, None]).squeeze(1)

    def head_rows(self, token_ids: Int32[mx.array, "tokens"]) -> Float[mx.array, "tokens hidden"]:
        """Return the head's weights for some tokens of the vocabulary: what a hidden row is multiplied with."""
        hidden = mx.zeros((token_ids.size, self.hidden_size), self.dtype)
        wanted = (token_ids[:, None] == mx.arange(self.vocab_size)).astype(self.compute_logits(hidden).dtype)
        _, rows = mx.vjp(self.compute_logits, [hidden], [wanted])
        return rows[0]

    def _bind(self, pool: KVCachePool) -> None:
        """Make one view per cache of the model, over the layers of ``pool``."""
        self._step = Step(self._mla_kernel)
        self._views = [layer.view(name, self._step, pool) for name, layer in self._trace.layers.items()]
        self._decode_step = program_step(self._program, list(self._trace.layers), pool)
        if self._decode_step is None and self._compiled_decode is not False:
            self._decode_step = module_step(
                self.module,
                self._split,
                self._trace.layers,
                pool,
                mla_kernel=self._mla_kernel,
                states=bool(self._compiled_decode),
            )
        self._pool = pool


def _leaves(module: nn.Module) -> Sequence[tuple[str, mx.array]]:
    leaves: Any = tree_flatten(module.parameters())
    return list(leaves)
