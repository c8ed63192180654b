"""vLLM's interfaces as both sides speak them, without importing vLLM: engine objects by era, and the native nccl wire."""
