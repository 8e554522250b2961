"""Write docs/configuration.md from the table of environment variables; with --check, only compare."""

import sys
from pathlib import Path

from vllm_metal_plugin.envs import TABLE

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by scripts/write_configuration_page.py from vllm_metal_plugin/envs.py; change that file. -->

`vllm serve` takes [vLLM's own options](https://docs.vllm.ai/en/latest/cli/serve/). These environment
variables add to them. A value outside the allowed set ends the launch with a message that names the
variable.

| Variable | Default | Allowed | Meaning |
|---|---|---|---|
"""

TAIL = """
## How much memory is used

`--kv-cache-memory-bytes` sets the size of the KV cache itself. Without it, the cache gets what a share
of the device's memory leaves after the weights and one worst-case step, which is measured at start. The
share is, in this order: `VLLM_METAL_MEMORY_FRACTION`, `--gpu-memory-utilization` when it was passed,
0.9. On a CPU the share is half of the memory that is free, and the cache at most 4 GiB, unless one of
the two was set.

The log has one line with all numbers:

```
Paged attention memory breakdown: metal_limit=51.54GB, fraction=0.90, usable_metal=46.39GB, …
```

| `VLLM_METAL_MEMORY_FRACTION` | `VLLM_METAL_USE_PAGED_ATTENTION` | |
|---|---|---|
| `auto` | `0` | mlx-lm's own caches; see [Memory](memory.md#without-pages) |
| `auto` | `1` | paged cache, share as above |
| `0.7` | `1` | paged cache with an explicit share |
| `0.7` | `0` | an error: the share is the budget of the paged cache |

When weights, one step and one request of the model's full length do not fit, the launch ends with the
same numbers and with every single change that would do, `--max-model-len` and its value among them.

Where models come from has variables of its own: [Hub and command line](hub.md#variables).
"""


def render() -> str:
    rows = (f"| `{var.name}` | `{var.default}` | {var.allowed} | {var.doc} |\n" for var in TABLE)
    return HEAD + "".join(rows) + TAIL


def main() -> int:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(render())
        return 0
    if PAGE.read_text() == render():
        return 0
    print(f"{PAGE} is not current. Run: python {Path(__file__).name}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
