"""vLLM's native nccl backend: the wire, a trainer that speaks to stock vLLM, and a worker that stock trainers speak to."""
