"""Proves packed CUDA kernels and programs on this machine's GPU: kernels to the bit, programs as ``cuda_decode`` does.

    python -m benchmarks.cuda_prove --packed FOLDER [--json FILE]

Without a GPU it ends in a sentence and exit code 2; where something is wrong, in exit code 1.
"""

from __future__ import annotations

from typing import Any

from lbllm_compile.codegen.errors import LbllmError

from . import cuda_decode, cuda_linears, cuda_packed, cuda_timing
from .cuda_timing import Bench, attempted


def main() -> int:
    options = cuda_timing.parser(__doc__ or "").parse_args()
    with cuda_timing.present_device() as driver:
        if options.packed is None:
            raise LbllmError("name what cuda_all.sh pack wrote with --packed")
        bench, proven, failed = Bench(driver, options.quick), dict[str, Any](), dict[str, str]()
        folder = options.packed / cuda_linears.KERNELS
        for form in ("gemv", "gemm"):
            for kernel in cuda_packed.read_index(folder, driver.arch, form)[0]:
                if not kernel.proof:
                    continue

                def proof(kernel: cuda_packed.PackedKernel = kernel) -> str:
                    function = cuda_packed.load(driver, folder, kernel)
                    count = cuda_linears.prove(bench, folder, kernel, function)
                    return f"{count} cases are equal to the bit"

                proven[kernel.name] = attempted(failed, kernel.name, proof)
        for path in sorted((options.packed / cuda_decode.MODELS).glob("*")):

            def agreement(name: str = path.name) -> str:
                folder = options.packed / cuda_decode.MODELS / name
                model = cuda_packed.PackedModel.read(folder)
                program = model.program(folder, driver)
                sequences = [program.sequence(cuda_packed.PROVEN_PROMPT) for _ in range(2)]
                return cuda_decode.agreeing(model, folder, *sequences)

            proven[path.name] = attempted(failed, path.name, agreement)
        document = {"machine": bench.facts(), "proven": proven, "failed": failed}
    cuda_timing.write(document, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    cuda_timing.ended(main)
