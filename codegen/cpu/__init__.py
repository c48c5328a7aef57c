"""What CPUs have of their own: which kernels, how they are made, proven and run, and running those of another CPU."""
