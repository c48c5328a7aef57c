"""Kernel families of CPUs: each module holds one family's data layout, its packing and its generated code."""
