"""Recording tensors: a worker's landings, learnt by running the engine's own loader once without writing anything."""

from weightcast.record.recording import Loader, Recording, live_memory, record_layout

__all__ = ["record_layout", "Recording", "Loader", "live_memory"]
