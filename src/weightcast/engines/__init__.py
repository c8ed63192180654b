"""Inference engines: the protocol they share, the embedded engine, and the adapters for stock vLLM and stock SGLang."""
