"""A local Hugging Face and ModelScope that misbehave on demand, for tests without the internet."""

from vllm_metal_hub.testing.fault_server import FaultServer
from vllm_metal_hub.testing.faults import Fault
from vllm_metal_hub.testing.repository import Repository

__all__ = ["Fault", "FaultServer", "Repository"]
