"""What is particular to GPUs: kernels that copy and digest, waits with deadlines, memory of other processes, NCCL."""
