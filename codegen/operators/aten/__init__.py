"""What a program can hold of torch's ``aten`` operators."""

from . import elementwise, networks, reductions, shapes

__all__ = ["elementwise", "networks", "reductions", "shapes"]
