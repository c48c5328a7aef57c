"""From a lowered graph to what runs: in torch on proven kernels, or as a stored program that needs no torch."""
