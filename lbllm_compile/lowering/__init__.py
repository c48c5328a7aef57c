"""From a lowered graph to what runs: bound to kernels in torch, or translated into a program that needs no torch."""
