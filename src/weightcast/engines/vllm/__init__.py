"""weightcast inside stock vLLM: a weight transfer backend and HTTP routes, through vLLM's own plug-in groups.

Imported only inside vLLM's processes. vLLM is not patched; what is used of it is listed in ``vllm.api``.
"""
