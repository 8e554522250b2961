"""``vllm-metal demo``: a real server, one question, its answer and what it cost."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_metal_hub import default_model, resolver
from vllm_metal_hub.device_probe import describe_device
from vllm_metal_hub.errors import HubError, UsageError
from vllm_metal_hub.model_ref import parse
from vllm_metal_hub.pull_display import PullDisplay
from vllm_metal_hub.server_process import (
    HOST,
    ServerProcess,
    ServerStoppedError,
    free_port,
    port_is_free,
    vllm_command,
)
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.terminal import FlowingText, StageDisplay, seconds_text

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT = "Explain in two sentences why the sky is blue."


@dataclass(frozen=True)
class DemoOptions:
    """What the user asked of the demo."""

    model: str | None = None
    prompt: str = PROMPT
    keep: bool = False
    port: int | None = None
    max_tokens: int = 128
    timeout_s: float = 900.0
    as_json: bool = False


@dataclass(frozen=True)
class Answer:
    """One streamed answer and its times in seconds."""

    text: str
    prompt_tokens: int
    tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first, per second after the first; None for an answer of one token."""
        seconds = self.total_s - self.first_token_s
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else None


def run_demo(options: DemoOptions, console: Console | None = None) -> int:
    """Serve, ask, print, stop; return the exit code.

    Raises:
        HubError: the model cannot be found, or the server does not come up.
    """
    console = console or Console(highlight=False, stderr=options.as_json)
    path, name = _model(options.model, console)
    port = _port(options.port)
    with _sigterm_interrupts(), _server(path, name, port) as server:
        try:
            with StageDisplay(console, f"[bold]{escape(name)}[/]: vllm serve on port {port}") as display:
                server.wait_ready(options.timeout_s, display.show)
                startup_s = display.elapsed_s
            console.print(f"[green]✓[/] [bold]{escape(name)}[/] is up after {startup_s:.0f} s at {server.base_url}")
            answer = _ask_and_print(server, name, options, console)
            console.print(_result_table(name, answer, server, describe_device()))
            if options.as_json:
                figures = {**asdict(answer), "tokens_per_s": answer.tokens_per_s, "startup_s": startup_s}
                print(
                    json.dumps({"model": name, "device": describe_device(), **figures}, indent=2, ensure_ascii=False)
                )
            if options.keep:
                _keep(server, name, console)
        except ServerStoppedError:
            _print_tail(server, console)
            raise
        except HubError:
            server.read_log()
            server.check_alive()
            raise
    return 0


def _model(text: str | None, console: Console) -> tuple[Path, str]:
    if text is None:
        return default_model.default_model(), default_model.NAME
    ref = parse(text)
    name = ref.path.stem if ref.path is not None else ref.label
    with PullDisplay(console, text) as display:
        return resolver.resolve(text, on_event=display).path, name


def _port(port: int | None) -> int:
    if port is None:
        return free_port()
    if not port_is_free(port):
        raise UsageError(f"[demo] expected a free port, got {port}, which is in use. Choose another --port.")
    return port


def _server(path: Path, name: str, port: int) -> ServerProcess:
    command = [
        *vllm_command(),
        "serve",
        str(path),
        "--host",
        HOST,
        "--port",
        str(port),
        "--served-model-name",
        name,
    ]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env.pop("VLLM_TARGET_DEVICE", None)  # a build-time variable; exported, it hides every platform plugin
    return ServerProcess(command, port, HubSettings.from_env().home / "logs" / f"demo-{port}.log", env)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that the server never outlives us."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, previous in zip(signals, before, strict=True):
            signal.signal(number, previous)


def _ask_and_print(server: ServerProcess, name: str, options: DemoOptions, console: Console) -> Answer:
    console.print(f"\n[bold cyan]>[/] {escape(options.prompt)}\n")
    started = time.monotonic()
    first_s, text, usage, flow = 0.0, [], (0, 0), FlowingText(console)
    for piece, counts in stream_answer(_client(server.base_url), name, options.prompt, options.max_tokens):
        usage = counts or usage
        if piece:
            first_s = first_s or time.monotonic() - started
            text.append(piece)
            flow.write(piece)
    total_s = time.monotonic() - started
    flow.end()
    if usage[1] >= options.max_tokens:
        console.print(f"[dim](cut off after --max-tokens {options.max_tokens})[/]")
    console.print()
    return Answer("".join(text), usage[0], usage[1], first_s or total_s, total_s)


def _client(base_url: str) -> "OpenAI":
    import openai

    transport = openai.DefaultHttpxClient(trust_env=False)  # no proxy between us and loopback
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, http_client=transport)


def stream_answer(
    client: "OpenAI", name: str, prompt: str, max_tokens: int
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield pieces of the answer as they come, and (prompt tokens, answer tokens) with the last one.

    A model without a chat template is asked to continue the prompt instead.

    Raises:
        HubError: the server refuses the question or breaks off.
    """
    import openai

    try:
        try:
            yield from _stream_chat(client, name, prompt, max_tokens)
        except openai.BadRequestError as error:
            if "chat template" not in str(error):
                raise
            yield from _stream_completion(client, name, prompt, max_tokens)
    except openai.OpenAIError as error:
        raise HubError(f"[demo] expected an answer, got {error}. Read the server's log.") from error


def _stream_chat(
    client: "OpenAI", name: str, prompt: str, max_tokens: int
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    chunks = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0.0,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in chunks:
        counts = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) if chunk.usage else None
        yield (chunk.choices[0].delta.content or "" if chunk.choices else ""), counts


def _stream_completion(
    client: "OpenAI", name: str, prompt: str, max_tokens: int
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    chunks = client.completions.create(
        model=name, prompt=prompt, max_tokens=max_tokens, temperature=0.0,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in chunks:
        counts = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) if chunk.usage else None
        yield (chunk.choices[0].text if chunk.choices else ""), counts


def _result_table(name: str, answer: Answer, server: ServerProcess, device: str) -> Table:
    log, speed = server.log, answer.tokens_per_s
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("model", escape(name))
    table.add_row("device", escape(device))
    table.add_row(
        "time to first token", f"{seconds_text(answer.first_token_s)} ({answer.prompt_tokens} prompt tokens)"
    )
    table.add_row("speed", f"{speed:.1f} tokens/s ({answer.tokens} tokens)" if speed else f"{answer.tokens} tokens")
    if log.kv_cache_tokens is not None:
        table.add_row("KV cache", f"{log.kv_cache_tokens:,} tokens")
    if log.max_concurrency is not None:
        table.add_row(
            "maximum concurrency",
            f"{log.max_concurrency:.1f} requests of {log.max_model_len or 0:,} tokens each",
        )
    return table


def _keep(server: ServerProcess, name: str, console: Console) -> None:
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    console.print("\n[bold]The server stays up until Ctrl-C.[/] Ask it from another terminal:\n")
    console.print(
        f"curl {server.base_url}/chat/completions \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d '{body}'\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{server.base_url}", api_key="none")\n'
        f'question = {{"role": "user", "content": "Hello!"}}\n'
        f'answer = client.chat.completions.create(model="{name}", messages=[question])\n'
        "print(answer.choices[0].message.content)\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"[dim]Log: {escape(str(server.log_path))}[/]", soft_wrap=True)
    try:
        while True:
            server.read_log()
            server.check_alive()
            time.sleep(0.5)
    except KeyboardInterrupt:
        console.print("Stopping the server …")


def _print_tail(server: ServerProcess, console: Console) -> None:
    console.print("[bold]The last lines of the server:[/]")
    for line in server.log.last_lines():
        console.print(f"  {line}", style="dim", markup=False, soft_wrap=True)
    print(f"Whole log: {server.log_path}", file=sys.stderr)
