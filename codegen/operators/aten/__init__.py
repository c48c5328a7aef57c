"""What a program can hold of torch's ``aten`` operators."""

from . import creation, elementwise, indexing, networks, reductions, shapes

__all__ = ["creation", "elementwise", "indexing", "networks", "reductions", "shapes"]
