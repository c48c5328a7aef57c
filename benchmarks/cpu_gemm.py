"""Times the generated many-token kernels against their C twin, torch and llama.cpp, on this machine's CPU.

    python -m benchmarks.cpu_gemm [--shapes 4096x4096:128 ...] [--tokens 1 2 4 8 ...] [--json FILE] [--plot FILE.png]

Weights are cycled over copies of 200 MB in all. All contenders take turns in one process; a time is the median of at
least 20 calls. Run it on an otherwise idle machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbllm_compile.bench.turns import alternate

from .harness import Settings, main, result

SETTINGS = Settings(
    shapes=((4096, 4096, 128), (11008, 4096, 128), (4096, 11008, 128), (576, 1536, 64)),
    tokens=(1, 2, 4, 8, 16, 64, 128, 512),
    quick=False,
)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Results of every shape and token count."""
    from lbllm_compile.codegen.targets import Target

    from .contenders import Problem, contenders

    target = Target.parse("cpu")
    for rows, columns, group in settings.shapes:
        for tokens in settings.tokens:
            problem = Problem.make(rows, columns, group, tokens, True, settings.quick)
            competing = {c.name: c for c in contenders(problem, target)}
            times = alternate({name: c.run for name, c in competing.items()}, settings.quick)
            for name, contender in competing.items():
                yield result(contender, times[name], rows, columns, group, tokens)


if __name__ == "__main__":
    main(__doc__ or "", "benchmarks.cpu_gemm", SETTINGS, measure, "tokens")
