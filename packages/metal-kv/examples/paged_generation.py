"""Paged, prefix-cached, continuously batched generation with mlx-lm: ``paged_generation.py [model directory]``."""

import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models import base, cache, llama

import metal_kv as kv


class PagedView(SimpleNamespace):
    """What a layer takes for its cache; every token of a step is a batch row of length 1."""

    make_mask = staticmethod(lambda *args, **kwargs: None)  # causality follows from positions
    update_and_fetch = staticmethod(lambda keys, values: (keys, values))


def attention(q, k, v, cache, scale, *args, own=base.scaled_dot_product_attention, **kwargs):
    """Write to, then attend over, the pages of a paged view; leave other caches to mlx-lm."""
    if not isinstance(cache, PagedView):
        return own(q, k, v, cache, scale, *args, **kwargs)
    written = cache.layer.write(k.squeeze(2), v.squeeze(2), cache.step)
    return cache.layer.attend(q.squeeze(2), cache.step, scale=scale, order_token=written)[:, :, None]


base.scaled_dot_product_attention = llama.scaled_dot_product_attention = attention  # llama has its own name
if sys.argv[1:]:
    model, tokenizer = load(sys.argv[1])
    prompts = [tokenizer.encode("The three largest cities of " + name) for name in ("France are", "Peru are")]
else:
    model = llama.Model(llama.ModelArgs("llama", 64, 2, 128, 4, 1e-5, 256, tie_word_embeddings=False))
    prompts = [[*range(7, 20), *tail] for tail in ([1, 2, 3], [1, 2, 9, 4], [5])]
model.set_dtype(mx.float32)
model(mx.array([[0]]), cache=(own := cache.make_prompt_cache(model)))  # they know the shapes
blocks = kv.BlockPool(num_blocks=256, block_size=4)
specs = tuple(kv.FullAttentionSpec(blocks.block_size, *c.keys.shape[1::2], dtype=c.keys.dtype) for c in own)
group = kv.CacheGroup(tuple(map(str, range(len(specs)))), specs)
pool = kv.KVCachePool(kv.CacheLayout.from_groups([group], blocks.num_blocks))
views = [PagedView(layer=pool.layer(name)) for name in pool.layer_names]
table, sequences, outputs = kv.BlockTable(len(prompts), blocks.num_blocks), [], []
for prompt in [*prompts, *[None] * 12]:  # one prompt joins at every step, then 12 steps follow
    new = [output[-1:] for output in outputs]
    if prompt:
        sequences, outputs = [*sequences, blocks.open(prompt)], [*outputs, []]
        new.append(prompt[sequences[-1].num_tokens :])
        print(f"prompt of {len(prompt)} tokens, {len(prompt) - len(new[-1])} of them in the cache")
    for row, (sequence, tokens) in enumerate(zip(sequences, new, strict=True)):
        sequence.append(tokens)
        table.add_row(row, sequence.block_ids)
    starts, lens = np.cumsum([0, *map(len, new)]), [sequence.num_tokens for sequence in sequences]
    PagedView.step = kv.AttentionMetadata.build(starts, lens, table.rows(len(lens)), blocks.block_size)
    PagedView.offset = PagedView.step.positions
    logits = model(mx.array(np.concatenate(new))[:, None], cache=views)[mx.array(starts[1:] - 1), 0]
    outputs = [[*tokens, new] for tokens, new in zip(outputs, logits.argmax(-1).tolist(), strict=True)]
alone = [generate_step(mx.array(p), model, max_tokens=len(out)) for p, out in zip(prompts, outputs, strict=True)]
print(outputs, "equal to mlx-lm's:", outputs == [[int(token) for token, _ in steps] for steps in alone])
