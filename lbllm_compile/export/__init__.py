"""Writes artifacts for other engines: the compiled weights in forms that they read.

=============  ======================================================================================================
``hf-dense``   a folder of transformers' form with plain weights: :mod:`.hf_dense`
``gguf``       a file of llama.cpp's: :mod:`.gguf`
=============  ======================================================================================================

What other engines compute with the weights is weight-only: activations and KV cache are theirs, in floating point. How
far that is from the artifact, whose activations have four bits, is measured where a text is given.
"""

from lbllm_compile.export.original import ExportError
from lbllm_compile.export.write import FORMATS, ExportReport, export, render

__all__ = ["FORMATS", "ExportError", "ExportReport", "export", "render"]
