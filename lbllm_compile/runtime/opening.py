"""From an artifact's directory to a model that generates text, without torch wherever that is possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lbllm_compile.codegen.progress import Progress
from lbllm_compile.native.language import LanguageModel
from lbllm_compile.native.program import NativeModel, find
from lbllm_compile.native.text import TextTokenizer


def open_model(
    directory: Path,
    *,
    target: str = "cpu",
    progress: Progress | None = None,
    check: Callable[[Any, Mapping[str, Any]], None] | None = None,
) -> LanguageModel:
    """A model to generate text with: the program stored for an artifact, which needs no torch, or else the artifact.

    Args:
        directory: what a compile wrote.
        target: what to run on.
        progress: told about kernels that have to be built.
        check: called with the tokenizer and the configuration before anything is built, which may take long; refuses
            by raising.

    Raises:
        ArtifactError, KernelError, TargetError: as :func:`~.loader.load`.
    """
    program = find(directory, target, progress)
    if program is not None and program.description.plain_tokenizer:
        model = NativeModel(program, TextTokenizer(directory))
        if check is not None:
            check(model.tokenizer, model.config)
        return model
    # torch takes seconds to import
    from lbllm_compile import artifact
    from lbllm_compile.runtime.loader import prepared

    loaded = artifact.load(directory)
    if check is not None:
        check(loaded.program.tokenizer, loaded.program.config)
    return prepared(loaded, target=target, progress=progress)
