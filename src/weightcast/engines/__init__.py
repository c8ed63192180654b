"""Inference engines: the protocol they share, the embedded engine, and the adapter for stock vLLM."""
