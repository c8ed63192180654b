"""Stands for SGLang's compiled kernels on a machine that has none: every name is a function, and calling one raises."""


def _missing(name):
    def kernel(*args, **kwargs):
        raise NotImplementedError(
            f"sgl_kernel.{name} is not there: this is the stand-in for a machine without SGLang's kernels"
        )

    kernel.__name__ = name
    return kernel


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)
