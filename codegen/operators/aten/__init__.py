"""What a program can hold of torch's ``aten`` operators."""

from . import complex_numbers, creation, elementwise, indexing, networks, reductions, shapes

__all__ = ["complex_numbers", "creation", "elementwise", "indexing", "networks", "reductions", "shapes"]
