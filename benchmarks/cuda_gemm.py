"""Times the CUDA kernels of W(1+1) linears for many tokens against cuBLAS, torch and copy bandwidth.

    python -m benchmarks.cuda_gemm [--packed FOLDER] [--tokens 4 16 128 512] [--json FILE]

``--packed`` names what ``benchmarks/cuda_all.sh pack`` wrote; without it kernels are made here, which takes TVM and a
CUDA compiler. ``benchmarks/cuda_linears.py`` says how it is timed. Without a GPU it ends in a sentence and exit code 2.
"""

from __future__ import annotations

from .cuda_linears import main
from .cuda_timing import ended

if __name__ == "__main__":
    ended(lambda: main(__doc__ or "", "gemm", (4, 16, 128, 512)))
