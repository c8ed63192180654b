"""The manifest: which checkpoint tensors a trainer publishes, by name, shape and type."""

from weightcast.manifest.manifest import ALIGNMENT, MAX_DIMS, Manifest, TensorSpec, align, is_countable

__all__ = ["ALIGNMENT", "MAX_DIMS", "Manifest", "TensorSpec", "align", "is_countable"]
