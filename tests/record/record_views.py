"""Random chains of view operations."""

from __future__ import annotations

import functools

from hypothesis import strategies as st

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), max_size=4).map(tuple)
STEPS = ["narrow", "select", "transpose", "split", "merge", "flat", "unsqueeze", "squeeze", "chunk", "step"]


def random_chain(data, tensor):
    """A chain of random view operations that suits the geometry of ``tensor``: one function of a tensor."""
    steps = []
    for kind in data.draw(st.lists(st.sampled_from(STEPS), max_size=6)):
        step = _step(data, tensor, kind)
        try:
            tensor = step(tensor)
        except RuntimeError:  # these strides cannot be viewed so
            continue
        steps.append(step)
    return lambda start: functools.reduce(lambda seen, step: step(seen), steps, start)


def _step(data, tensor, kind):
    if tensor.dim() == 0:
        return lambda t: t.unsqueeze(0)
    dim = data.draw(st.integers(0, tensor.dim() - 1))
    size = tensor.shape[dim]
    at, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, tensor.dim() - 1))
    length = data.draw(st.integers(1, size - at))
    factor = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    return {
        "narrow": lambda t: t.narrow(dim, at, length),
        "select": lambda t: t.select(dim, at),
        "transpose": lambda t: t.transpose(dim, other),
        "unsqueeze": lambda t: t.unsqueeze(dim),
        "squeeze": lambda t: t.squeeze(dim),
        "chunk": lambda t: t.chunk(2, dim)[-1],
        "step": lambda t: t[::2],
        "split": lambda t: t.view(*before, factor, size // factor, *after),
        "merge": lambda t: t.view(*before, -1, *after[1:]),
        "flat": lambda t: t.view(-1),
    }[kind]
