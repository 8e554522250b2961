"""Requests that decode together: their caches as one batch of mlx-lm's, kept from step to step."""

from collections.abc import Collection, Sequence

import mlx.core as mx

from metal_models.request_caches import Caches


def batchable(caches: Caches) -> bool:
    """Tell whether mlx-lm has a batched form of every cache."""
    return all(hasattr(cache, "merge") for cache in caches)


class DecodeBatch:
    """The batched caches, and whose they are.

    A request's caches are here or with their owner, never in both places.
    """

    def __init__(self) -> None:
        self.req_ids: list[str] = []
        self.caches: Caches = []

    def release(self, req_ids: Collection[str]) -> dict[str, Caches]:
        """Take some requests out; return their caches, each alone."""
        leaving = [index for index, req_id in enumerate(self.req_ids) if req_id in req_ids]
        released = {self.req_ids[index]: [cache.extract(index) for cache in self.caches] for index in leaving}
        self.drop(req_ids)
        return released

    def drop(self, req_ids: Collection[str]) -> None:
        """Take some requests out and forget their caches."""
        staying = [index for index, req_id in enumerate(self.req_ids) if req_id not in req_ids]
        if len(staying) == len(self.req_ids):
            return
        self.req_ids = [self.req_ids[index] for index in staying]
        if not staying:
            self.caches = []
        for cache in self.caches:
            cache.filter(mx.array(staying, mx.int32))

    def join(self, joining: Sequence[tuple[str, Caches]]) -> None:
        """Take requests in, after those that are here."""
        if not joining:
            return
        merged = [own[0].merge(list(own)) for own in zip(*(caches for _, caches in joining), strict=True)]
        if self.caches:
            for cache, more in zip(self.caches, merged, strict=True):
                cache.extend(more)
        else:
            self.caches = merged
        self.req_ids += [req_id for req_id, _ in joining]
