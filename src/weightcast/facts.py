"""Facts: what a process says about itself so that the other side can choose a transport."""

from __future__ import annotations

import msgspec

from weightcast.quoted import quote_fields


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Filled in by transports.facts; travels in a worker's first message."""

    host: str
    """Equal exactly for processes that share memory and a file system: boot id plus identity of /dev/shm."""
    pid: int
    device: str
    """Where the weights lie: "cpu" or "cuda"."""
    gpu: str = ""
    """UUID of the GPU, empty on CPU."""
    visible_gpus: tuple[str, ...] = ()
    """UUIDs of all GPUs that this process can use: CUDA_VISIBLE_DEVICES may leave it fewer than the host has."""
    mappable: bool = True
    """Whether other processes can map its GPU memory, as far as the settings of torch's allocator tell."""
    nccl_host: str = ""
    """What NCCL takes for its host, empty without a GPU: it refuses two ranks that have one GPU of one host."""
    rdma: bool = False
    """Whether its host has RDMA devices."""
    transports: tuple[str, ...] = ()
    """Names this process could load and use."""
    folders: tuple[str, ...] = ()
    """Trainer: folders of the files that its weights are parts of."""
    roots: tuple[str, ...] = ()
    """Worker: folders below which it opens files of weights that a trainer names."""
    address: str = "127.0.0.1"
    """Where other hosts reach this process."""

    def __post_init__(self) -> None:
        quote_fields(self)
