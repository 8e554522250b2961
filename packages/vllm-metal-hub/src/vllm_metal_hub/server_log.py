"""What the lines that ``vllm serve`` prints mean for someone who waits for it."""

import re
from collections import deque
from dataclasses import dataclass, field

# (pattern, what the server does from that line on), in the order of a start.
_STAGES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), label)
    for pattern, label in (
        (r"vLLM API server version|non-default args", "reading the model's configuration"),
        (r"Resolved architecture", "starting the engine"),
        (r"Initializing a V1 LLM engine", "loading weights"),
        (r"Paged attention memory breakdown|Model loading took|Loaded .* in ", "measuring memory"),
        (r"KV cache size: ", "warming up"),
        (r"init engine .* took", "opening the port"),
        (r"Application startup complete", "ready"),
    )
)
_CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens[^:]*: ([\d.]+)x")
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] )?")
_CAUSE = re.compile(
    r"^((?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*|(?:vllm serve: |vllm: )?error: .*)"
)
# Banners, and other libraries' warnings.
_NOISE = re.compile(r"[█▄▀]|^[IW]\d{4} [\d:.]+ |^Route: |ulimit")
# Wrappers that say only that something else went wrong before.
_WRAPPER = re.compile(r"Engine core initialization failed|EngineDeadError|See root cause above|WorkerProc|SystemExit")


@dataclass
class ServerLog:
    """Reads the lines of one server, in order.

    ``stage`` says what the server does now. The capacity fields stay ``None`` until it knows them.
    """

    stage: str = "starting Python and vLLM"
    kv_cache_tokens: int | None = None
    max_model_len: int | None = None
    max_concurrency: float | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    _reached: int = -1

    def feed(self, line: str) -> bool:
        """Take one line; tell whether ``stage`` changed."""
        text = _PREFIX.sub("", line.rstrip())
        if not text.strip():
            return False
        self.tail.append(text)
        if match := _CAPACITY.search(text):
            self.kv_cache_tokens = int(match[1].replace(",", ""))
            self.max_model_len = int(match[2].replace(",", ""))
            self.max_concurrency = float(match[3])
        for index in range(len(_STAGES) - 1, self._reached, -1):
            if _STAGES[index][0].search(text):
                self._reached, self.stage = index, _STAGES[index][1]
                return True
        return False

    def reason(self) -> str:
        """The one line that says why the server stopped: its last exception that wraps no other."""
        found = (_CAUSE.match(line.strip()) for line in self.tail)
        causes = [match[1].removeprefix("error: ") for match in found if match]
        own = [cause for cause in causes if not _WRAPPER.search(cause)]
        if own:
            return own[-1]
        return causes[-1] if causes else (self.tail[-1] if self.tail else "it printed nothing")

    def last_lines(self, count: int = 8) -> list[str]:
        """The last lines worth showing: no frames of a traceback, no blank or repeated lines."""
        lines = [line for line in self.tail if not line.startswith((" ", "\t", "Traceback ("))]
        return [line[:300] for line in dict.fromkeys(lines) if not _NOISE.search(line)][-count:]
