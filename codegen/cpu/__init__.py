"""What CPUs have of their own: running the kernels of one that is not here."""
