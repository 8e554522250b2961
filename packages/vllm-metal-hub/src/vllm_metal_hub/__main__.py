"""Run the command line as ``python -m vllm_metal_hub``."""

import sys

from vllm_metal_hub.cli import main

sys.exit(main())
