"""``vllm-metal plan``: what a model would take of this machine, before its weights are fetched."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vllm_metal_hub.chips import bandwidth
from vllm_metal_hub.errors import HubError, UsageError
from vllm_metal_hub.events import OnEvent, silent
from vllm_metal_hub.file_selection import is_weight
from vllm_metal_hub.held_weights import held_bytes
from vllm_metal_hub.model_ref import parse
from vllm_metal_hub.pull_display import PullDisplay
from vllm_metal_hub.resolver import list_files, resolve
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.sizes import bytes_text
from vllm_metal_hub.snapshot import LocalSnapshot

if TYPE_CHECKING:
    from metal_kv import MemoryBudget

BLOCK_SIZE = 16
STEP_BYTES = 1_000_000_000
"""Assumed for one step's activations; the server measures it when it starts."""


CACHE_DTYPES = ("auto", "fp8", "int8_per_token_head", "int4_per_token_head")
STEP_TOKENS = 2 * 2048
"""Tokens in flight: two steps of vLLM's default size."""


@dataclass(frozen=True)
class Machine:
    """What to plan for.

    Attributes:
        memory_bytes: Memory of another Mac; None for this machine.
        fraction: Share of it that the server is given; None for what it takes by itself.
        max_model_len: Length of a request; None for what the model was made for.
        bandwidth: Bytes per second that its chip reads from memory; None where it is not known.
    """

    memory_bytes: int | None = None
    fraction: float | None = None
    max_model_len: int | None = None
    bandwidth: int | None = None


@dataclass(frozen=True)
class CacheOption:
    """What fits with one ``--kv-cache-dtype``: tokens in all, the longest request, and how many of that length."""

    cache_dtype: str
    tokens: int
    context: int
    concurrency: int


@dataclass(frozen=True)
class Plan:
    """Figures in bytes and tokens; ``context`` is the longest single request, at most what the model was made for.

    ``options`` are the same with other formats of the cache, none for an encoder, which has none; ``breakdown`` is the
    line that the server prints.
    ``decode_bounds`` are the tokens/s of one request, with an empty cache and at full length, that reading weights and
    cache once a token allows; None where the chip is not known, or not all weights are read.
    """

    model: str
    fetch_bytes: int
    free_disk_bytes: int
    weight_bytes: int
    usable_memory_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    context: int
    trained_context: int
    options: tuple[CacheOption, ...] = ()
    breakdown: str = ""
    decode_bounds: tuple[float, float] | None = None

    @property
    def fits(self) -> bool:
        """Tell whether the model can be served at all."""
        return self.context > 0


def plan(options: argparse.Namespace) -> int:
    """Show the plan; exit code 1 when the model does not fit."""
    console = Console(highlight=False)
    speed = None if options.chip is None else bandwidth(options.chip, options.memory)
    machine = Machine(options.memory, options.gpu_memory_utilization, options.max_model_len, speed)
    with PullDisplay(Console(stderr=True, highlight=False), options.ref) as display:
        found = make_plan(options.ref, options.revision, on_event=display, machine=machine)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        console.print(table(found))
        if found.options:
            console.print(options_table(found))
        console.print(found.breakdown, style="dim", soft_wrap=True)
        console.print(f"vllm-metal serve {command_line(options.ref, found, machine)}", soft_wrap=True)
    if not found.fits:
        raise HubError(no_room(found))
    return 0


def no_room(found: Plan) -> str:
    """What to tell someone whose model does not fit."""
    if not found.options:
        return (
            f"[plan] expected room for the weights of {found.model} and one step, got "
            f"{bytes_text(found.usable_memory_bytes)}. Choose a smaller model, or raise VLLM_METAL_MEMORY_FRACTION."
        )
    return (
        f"[plan] expected room for the cache of one request to {found.model}, got "
        f"{bytes_text(max(found.kv_cache_bytes, 0))}. "
        "Choose a smaller or more quantized model, or raise VLLM_METAL_MEMORY_FRACTION."
    )


def as_json(found: Plan) -> dict[str, Any]:
    """For scripts."""
    return {**asdict(found), "fits": found.fits}


def make_plan(
    text: str,
    revision: str | None = None,
    *,
    name: str | None = None,
    fraction: float | None = None,
    on_event: OnEvent = silent,
    machine: Machine | None = None,
) -> Plan:
    """Read the configuration, fetched alone if it has to be, and divide this machine's memory.

    ``fraction`` of the memory is the server's; None is what it takes by itself. ``name`` is what the plan calls it.
    ``machine`` says more of what to plan for.

    Raises:
        UsageError: a GGUF reference that is not on this machine: its configuration is inside the file.
        HubError: the model cannot be found, or its architecture is not supported.
    """
    settings = HubSettings.from_env()
    small = resolve(text, revision=revision, profile="small", on_event=on_event)
    config_path = _configuration(small.path)
    if config_path is None:
        raise UsageError(f"[plan] expected a model with a config.json, got {text}. Pull it first: vllm-metal pull.")
    config = json.loads(config_path.read_text())
    stored, fetch = _weight_bytes(text, revision, small, on_event)
    machine = machine or Machine(fraction=fraction)
    weights = _held_bytes(small.path, config, stored, machine)
    return _divide(name or parse(text).label, config, weights, fetch, settings, machine)


def _configuration(path: Path) -> Path | None:
    """The config.json of a snapshot: for a GGUF file, the one that is written out of it."""
    if path.is_file() or (not (path / "config.json").is_file() and any(path.glob("*.gguf"))):
        from vllm_metal_plugin.errors import ModelFilesError
        from vllm_metal_plugin.model_path import resolve as open_gguf

        try:
            path = Path(open_gguf(str(path)))
        except ModelFilesError as error:
            raise HubError(str(error)) from error
    return path / "config.json" if (path / "config.json").is_file() else None


def _weight_bytes(text: str, revision: str | None, small: LocalSnapshot, on_event: OnEvent) -> tuple[int, int]:
    """Bytes of the weights, and how many would have to be fetched."""
    if small.path.is_file():
        names = {entry.path for entry in small.files if is_weight(entry.path)} or {small.path.name}
        return sum((small.path.parent / Path(name).name).stat().st_size for name in names), 0
    here = _sizes(small.path, "*.safetensors", "*.gguf") or _sizes(small.path, "pytorch_model*.bin")
    if here or small.source == "local":
        return here, 0
    sizes = sum(entry.size for entry in small.files if not is_weight(entry.path))
    listed = list_files(text, revision=revision, on_event=on_event)["bytes"]
    return int(listed) - sizes, int(listed)


def _held_bytes(path: Path, config: dict[str, Any], stored: int, machine: Machine) -> int:
    """Bytes of the weights in the server's memory."""
    from vllm_metal_plugin import memory

    on_cpu = _on_cpu(machine)
    dtype = _dtype(config, on_cpu)
    limit = memory.expanded_weights_limit("cpu", dtype) if on_cpu else 0
    return held_bytes(path, config, stored, dtype=dtype, expand_to_bytes=limit)


def _sizes(directory: Path, *patterns: str) -> int:
    return sum(path.stat().st_size for pattern in patterns for path in directory.glob(pattern))


def _divide(
    name: str, config: dict[str, Any], weights: int, fetch: int, settings: HubSettings, machine: Machine
) -> Plan:
    from metal_models.encoders import is_encoder

    free_disk = shutil.disk_usage(_existing(settings.hf_cache)).free
    if is_encoder(config):
        return _encoder(name, config, weights, fetch, free_disk, machine)
    budgets = {cache: _budget(config, weights, cache, machine) for cache in CACHE_DTYPES}
    trained = int(config.get("max_position_embeddings") or 0)
    options = tuple(
        CacheOption(cache, budget.max_tokens_cached, budget.max_model_len(machine.max_model_len or trained or
                    budget.max_tokens_cached, blocks), _at_once(budget, machine.max_model_len or trained, blocks))
        for cache, planned in budgets.items() if planned is not None for budget, blocks in [planned]
    )  # fmt: skip
    if (planned := budgets["auto"]) is None:
        raise HubError(
            f"[plan] expected layers whose caches share pages of {BLOCK_SIZE} tokens, got others in {name}."
        )
    budget, blocks = planned
    longest = options[0].context
    return Plan(
        name, fetch, free_disk, weights, budget.usable, budget.kv_budget, budget.max_tokens_cached, longest, trained,
        options, str(budget),
        _decode_bounds(config, weights, blocks(longest) * budget.per_block_bytes, machine),
    )  # fmt: skip


def _encoder(name: str, config: dict[str, Any], weights: int, fetch: int, free_disk: int, machine: Machine) -> Plan:
    """A model that takes prompts whole and caches nothing: it fits if its weights and one step do."""
    from metal_models import MetalModelsError
    from metal_models.encoders import max_length

    try:
        longest = max_length(config)
    except MetalModelsError as error:
        raise HubError(str(error)) from error
    limit, fraction, _ = _memory(machine)
    usable = int(limit * fraction)
    context = min(machine.max_model_len or longest, longest) if weights + STEP_BYTES <= usable else 0
    left = bytes_text(max(0, usable - weights - STEP_BYTES))
    return Plan(
        name, fetch, free_disk, weights, usable, 0, 0, context, longest, (), f"Encoder: {left} left; no KV cache"
    )


def _decode_bounds(config: dict[str, Any], weights: int, cache: int, machine: Machine) -> tuple[float, float] | None:
    """Tokens per second of one request without and with a full cache of so many bytes."""
    if machine.bandwidth is None or not weights or any("expert" in name for name in config):
        return None
    return machine.bandwidth / weights, machine.bandwidth / (weights + cache)


def _budget(
    config: dict[str, Any], weights: int, cache: str, machine: Machine
) -> tuple["MemoryBudget", Callable[[int], int]] | None:
    """The budget with one format of the cache, and the blocks of a request; None where layers cannot be stored so."""
    from metal_kv import MemoryBudget, SpecError, bytes_per_block, max_blocks_per_request
    from metal_models import MetalModelsError
    from metal_models.capacity import cache_groups
    from vllm_metal_plugin import memory
    from vllm_metal_plugin.cache_formats import VLLM_NAMES

    limit, fraction, bounded = _memory(machine)
    element = VLLM_NAMES[cache]
    on_cpu = _on_cpu(machine)
    try:
        groups = cache_groups(config, dtype=_dtype(config, on_cpu), block_size=BLOCK_SIZE, key=element, value=element)
    except MetalModelsError as error:
        raise HubError(str(error)) from error
    except SpecError:
        return None
    budget = MemoryBudget.plan(
        limit,
        fraction,
        model_memory=weights,
        overhead=STEP_BYTES,
        per_block_bytes=bytes_per_block(groups),
        block_size=BLOCK_SIZE,
        kv_budget_limit=memory.CPU_KV_CACHE_BYTES if bounded else None,
    )
    return budget, lambda num_tokens: max_blocks_per_request(groups, num_tokens, STEP_TOKENS)


def _on_cpu(machine: Machine) -> bool:
    from vllm_metal_plugin import device

    return device.select_device() == "cpu" and machine.memory_bytes is None


def _memory(machine: Machine) -> tuple[int, float, bool]:
    """Bytes to plan with, the server's share of them, and whether that is a CPU's, which bounds the cache, too."""
    from vllm_metal_plugin import device, memory
    from vllm_metal_plugin.envs import read_envs

    asked = read_envs().memory_fraction or machine.fraction
    on_cpu = _on_cpu(machine)
    limit = device.free_memory_bytes() if on_cpu else device.total_memory_bytes(device.select_device())
    if machine.memory_bytes is not None:
        limit = metal_share(machine.memory_bytes)
    return limit, asked or (memory.CPU_FRACTION if on_cpu else memory.DEFAULT_FRACTION), on_cpu and asked is None


def _at_once(budget: "MemoryBudget", num_tokens: int, blocks: Callable[[int], int]) -> int:
    """Requests of that length that the cache holds together; one block is the null block."""
    return max(0, budget.num_blocks - 1) // max(1, blocks(num_tokens or 1))


def _dtype(config: dict[str, Any], on_cpu: bool) -> Any:
    """What the server computes in: float32 on a CPU, else what the checkpoint says, halved if that is float32."""
    import mlx.core as mx

    named = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    return mx.float32 if on_cpu else {"float16": mx.float16}.get(named, mx.bfloat16)


def metal_share(memory_bytes: int) -> int:
    """What Metal recommends as the most to use on a Mac: two thirds of its memory, three quarters from 36 GB on."""
    return memory_bytes * 3 // 4 if memory_bytes >= 36 << 30 else memory_bytes * 2 // 3


def _existing(path: Path) -> Path:
    while not os.path.exists(path):
        path = path.parent
    return path


def table(found: Plan) -> Table:
    """For people."""
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows.add_column(style="dim")
    rows.add_column()
    rows.add_row("model", found.model)
    rows.add_row("to fetch", f"{bytes_text(found.fetch_bytes)} ({bytes_text(found.free_disk_bytes)} free)")
    rows.add_row("memory to use", bytes_text(found.usable_memory_bytes))
    rows.add_row("weights", bytes_text(found.weight_bytes))
    rows.add_row("one step", f"{bytes_text(STEP_BYTES)} assumed; measured at start")
    cache = f"{bytes_text(max(found.kv_cache_bytes, 0))}: {found.kv_cache_tokens:,} tokens"
    rows.add_row("KV cache", cache if found.options else "none: prompts are computed whole, for embeddings and scores")
    trained = f" of the {found.trained_context:,} it was trained for" if found.trained_context else ""
    rows.add_row("context", f"{found.context:,} tokens{trained}")
    if found.decode_bounds is not None:
        empty, full = found.decode_bounds
        bound = f"at most {empty:,.0f} tokens/s for one request, {full:,.0f} at full length"
        rows.add_row("decoding", f"{bound}: what its memory allows, not a measurement")
    return rows


def options_table(found: Plan) -> Table:
    """What fits with which format of the cache."""
    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("--kv-cache-dtype", "tokens", "longest request", "requests of full length"):
        rows.add_column(title, justify="left" if title.startswith("-") else "right")
    for option in found.options:
        rows.add_row(option.cache_dtype, f"{option.tokens:,}", f"{option.context:,}", f"{option.concurrency:,}")
    return rows


def command_line(ref: str, found: Plan, machine: Machine) -> str:
    """What follows ``vllm-metal serve`` for the first format that holds a request of the length that is wanted."""
    wanted = machine.max_model_len or found.trained_context
    fitting = next((option for option in found.options if option.context >= wanted), None)
    encoder = CacheOption("auto", 0, found.context, 0)
    chosen = fitting or max(found.options, key=lambda option: option.context, default=encoder)
    words = [ref, f"--max-model-len {min(wanted, chosen.context) if wanted else chosen.context}"]
    if chosen.cache_dtype != "auto":
        words.append(f"--kv-cache-dtype {chosen.cache_dtype}")
    if machine.fraction is not None:
        words.append(f"--gpu-memory-utilization {machine.fraction:g}")
    return " ".join(words)
