"""The engine in its own process and the worker in another, both spawned."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=1 << 20,
              distributed_executor_backend="mp")
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    prompts = [{"prompt_token_ids": p} for p in ([1, 5, 9, 17], [1, 33, 44])]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print("tokens:" + json.dumps([list(out.outputs[0].token_ids) for out in outputs]))
"""


def test_spawned_engine_and_worker(
    model_dir: Path, tmp_path: Path, mlx_lm_tokens: Callable[[Sequence[int], int], list[int]]
) -> None:
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), str(model_dir)], capture_output=True, text=True, timeout=500, check=False
    )
    lines = [line for line in run.stdout.splitlines() if "tokens:" in line]
    assert lines, run.stdout[-3000:] + run.stderr[-3000:]
    tokens = json.loads(lines[0].partition("tokens:")[2])
    assert tokens == [mlx_lm_tokens([1, 5, 9, 17], 8), mlx_lm_tokens([1, 33, 44], 8)]
    assert "Traceback" not in run.stderr + run.stdout
