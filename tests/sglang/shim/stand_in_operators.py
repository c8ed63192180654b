"""Declares torchvision's operators right before torchvision is imported: its compiled part, which would, does not load here."""

import sys
from importlib.abc import MetaPathFinder


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; the first look for torchvision declares the operators."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare()


def _declare():
    from torch.library import Library

    global _library
    _library = Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_library = None
sys.meta_path.insert(0, _BeforeTorchvision())
