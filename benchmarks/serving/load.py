"""Send concurrent streaming completions and report what came back, and how fast."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import openai


@dataclass(frozen=True)
class Result:
    """One round of concurrent requests."""

    tokens: int
    seconds: float  # from the first token of the round to the last
    texts: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """Decode throughput of the round; the first token of each request belongs to its prefill."""
        return (self.tokens - len(self.texts)) / self.seconds


async def stream(
    client: openai.AsyncOpenAI, model: str, prompt: str, options: dict[str, Any]
) -> tuple[float, float, int, str]:
    """Return the arrival times of the first and last token, the number of tokens, and the text."""
    first = last = 0.0
    tokens, text = 0, ""
    answer = await client.completions.create(
        model=model, prompt=prompt, stream=True, stream_options={"include_usage": True}, **options
    )
    async for chunk in answer:
        if chunk.choices and chunk.choices[0].text:
            last = time.perf_counter()
            first = first or last
            text += chunk.choices[0].text
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return first, last, tokens, text


async def _round(url: str, model: str, prompts: list[str], options: dict[str, Any]) -> Result:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0) as client:
        rows = await asyncio.gather(*(stream(client, model, prompt, options) for prompt in prompts))
    seconds = max(row[1] for row in rows) - min(row[0] for row in rows)
    return Result(sum(row[2] for row in rows), seconds, tuple(row[3] for row in rows))


def run_round(url: str, model: str, prompts: list[str], **options: Any) -> Result:
    """Send all ``prompts`` at once and wait for every answer."""
    return asyncio.run(_round(url, model, prompts, options))
