"""Times the generated one-token kernels against their C twins, torch and llama.cpp, on this machine's CPU.

    python -m benchmarks.cpu_gemv [--shapes 4096x4096:128 ...] [--threads 1 2] [--json FILE] [--plot roofline.png]

*hot*: one copy of the weights, *cold*: copies of 200 MB in all in turn, as in decoding, where no layer's weights are
still cached when their turn comes again. All contenders take turns in one process; a time is the median of at least 20
calls. The generated kernels are called from Python through a prepared call, the C twins are timed inside C. Run it on
an otherwise idle machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbllm_compile.bench.turns import alternate

from .harness import Settings, main, result

SETTINGS = Settings(
    shapes=((4096, 4096, 128), (11008, 4096, 128), (4096, 11008, 128), (576, 1536, 64)), tokens=(1,), quick=False
)


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Results of every shape, hot and cold."""
    from lbllm_compile.codegen.targets import Target

    from .contenders import Problem, contenders

    target = Target.parse("cpu")
    for rows, columns, group in settings.shapes:
        for cold in (False, True):
            problem = Problem.make(rows, columns, group, 1, cold, settings.quick)
            competing = {c.name: c for c in contenders(problem, target)}
            times = alternate({name: c.run for name, c in competing.items()}, settings.quick)
            for name, contender in competing.items():
                yield result(contender, times[name], rows, columns, group, 1, cache="cold" if cold else "hot")


if __name__ == "__main__":
    main(__doc__ or "", "benchmarks.cpu_gemv", SETTINGS, measure, "cache")
