"""A whole lowered graph as one program: Relax functions that call proven kernels, compiled into one shared library."""
