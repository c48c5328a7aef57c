"""CUDA kernels: their text, their compiler, their proof by emulation, and a device to run them on."""
