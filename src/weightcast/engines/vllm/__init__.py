"""weightcast inside stock vLLM: a weight transfer backend and HTTP routes, through vLLM's own plug-in groups.

Imported only inside vLLM's processes. No file of vLLM is changed. What is used of its model loading is listed in ``api``, what is
called of its engine objects in ``weightcast.vllm_protocol.eras``; ``backend`` implements its contract for workers.
"""
