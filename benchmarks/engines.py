"""How far llama.cpp is from an artifact: the KL divergence of logits on a text, for each type of GGUF file.

    python -m benchmarks.engines --artifact DIR --text FILE [--types q8_0 f16 …] [--requantized q4_0 …] [--json FILE]

What ``export --format gguf --type …`` wrote, and what llama.cpp made of the file with the exact weights, is read by
llama.cpp (``llama-cpp-python``) and held against the artifact twice: against its graph with float activations, which is
what a GGUF file has, and against what runs, with quantized activations and KV cache. What runs is held against the
graph with float activations, too. Of ``f32`` files llama.cpp computes in float, like the graph; the input of every
product it rounds to 16 bits where the matrix is ``f16`` or ``bf16``, and to 8 bits where it has blocks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from lbllm_compile.codegen.errors import LbllmError
from lbllm_compile.passes.ir import weight_only
from torch import Tensor

from lbllm_compile import artifact, frontend
from lbllm_compile.bench.llama import facts, missing
from lbllm_compile.evaluate import Excerpt, Scores
from lbllm_compile.export import export, ggml
from lbllm_compile.runtime.loader import prepared

from . import harness, llama

WEIGHTS, OWN = "weights, float activations", "artifact"
"""What is compared with."""


def measure(
    directory: Path,
    text: Path,
    kinds: Sequence[str],
    requantized: Sequence[str],
    seq_len: int,
    chunks: int,
    threads: int,
) -> dict[str, Any]:
    """Scores of every file against both references.

    Args:
        directory: the artifact.
        text: a UTF-8 text file.
        kinds: types that are exported, of :data:`.ggml.TYPES`.
        requantized: types that llama.cpp makes of the exact file, of :data:`.llama.FILE_TYPES`.
        seq_len, chunks: how the text is cut, see :class:`Excerpt`.
        threads: of llama.cpp.

    Raises:
        LbllmError: GGUF cannot hold the artifact, llama.cpp is not here, or the text cannot be used.
    """
    if why := missing():
        raise LbllmError(f"llama.cpp is not there; {why}")
    loaded = artifact.load(directory)
    program = loaded.program
    excerpt = Excerpt.of(program, text, seq_len, chunks)
    compiled = prepared(loaded)
    references: dict[str, Callable[[Tensor], Tensor]] = {
        WEIGHTS: lambda ids: weight_only.run(program, frontend.language_model_inputs(ids)),
        OWN: compiled.logits,
    }
    with tempfile.TemporaryDirectory() as folder:
        files = _files(directory, kinds, requantized, threads, Path(folder))
        sizes = {name: 8 * file.stat().st_size / _weights(file) for name, file in files.items()}
        scorers = {name: llama.Scorer(file, seq_len, threads) for name, file in files.items()}
        pairs = [(name, reference) for name in files for reference in references]
        scores = {pair: Scores() for pair in [*pairs, (OWN, WEIGHTS)]}
        with torch.no_grad():
            for number, ids in enumerate(excerpt.pieces):
                expected = {name: reference(ids) for name, reference in references.items()}
                found = {OWN: expected[OWN]}
                for name, scorer in scorers.items():
                    found[name] = torch.from_numpy(scorer.logits(ids[0].tolist()))[None]
                for (name, reference), kept in scores.items():
                    kept.add(ids, found[name], expected[reference])
                harness.CONSOLE.print(f"[dim]{number + 1} of {len(excerpt.pieces)} chunks[/dim]")
        for scorer in scorers.values():
            scorer.close()
    rows = [
        {"engine": name, "against": reference, "bits_per_weight": sizes.get(name), **kept.summary()}
        for (name, reference), kept in scores.items()
    ]
    return {**excerpt.facts, **facts(), "results": rows}


def _files(
    directory: Path, kinds: Sequence[str], requantized: Sequence[str], threads: int, folder: Path
) -> dict[str, Path]:
    """GGUF files by what they are called here."""
    files = {}
    for kind in kinds:
        files[f"llama.cpp {kind}"] = folder / f"{kind}.gguf"
        export(directory, "gguf", folder / f"{kind}.gguf", type=kind)
    made = llama.export_artifact(directory, requantized, threads, folder / "requantized") if requantized else {}
    return files | {f"llama.cpp {kind} of its own making": file for kind, file in made.items()}


def _weights(file: Path) -> int:
    """How many are in a GGUF file."""
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(file)).tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=Path("demo-out"), metavar="DIR", help="what a compile wrote")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--types", nargs="+", choices=list(ggml.TYPES), default=list(ggml.TYPES), metavar="TYPE")
    made = sorted(llama.FILE_TYPES)
    parser.add_argument("--requantized", nargs="*", choices=made, default=["q4_0"], metavar="TYPE")
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="chunks at most")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of to stdout")
    options = parser.parse_args()
    try:
        document = measure(
            options.artifact,
            options.text,
            options.types,
            options.requantized,
            options.seq_len,
            options.chunks,
            options.threads,
        )
    except LbllmError as error:
        sys.exit(str(error))
    for row in document["results"]:
        shown = f"mean KL {row['kld_mean']:.2g}, top-1 agreement {100 * row['top1_agreement']:.1f} %"
        size = f" ({row['bits_per_weight']:.2f} bits a weight)" if row["bits_per_weight"] else ""
        harness.CONSOLE.print(f"{row['engine']}{size} against {row['against']}: {shown}, perplexity {row['ppl']:.2f}")
    harness.write_json(document, options.json)


if __name__ == "__main__":
    main()
