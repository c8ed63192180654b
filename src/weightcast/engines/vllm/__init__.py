"""weightcast inside stock vLLM: a weight transfer backend and HTTP routes, through vLLM's own plug-in groups.

Imported only inside vLLM's processes. No file of vLLM is changed; its workers get one more method, ``weightcast_call``.
"""
