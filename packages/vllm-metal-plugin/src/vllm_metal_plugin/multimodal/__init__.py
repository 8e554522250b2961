"""Images, video and sound of requests, between vLLM's processors and the towers of ``metal_models.multimodal``."""
