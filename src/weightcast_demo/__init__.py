"""Demos: a policy that learns while a live server serves it, and weights streamed into a running server.

The trainer's side of both is here; the server is always another process, ``weightcast serve``.
"""
