"""From an artifact's directory to a model that generates text, without torch wherever that is possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lbllm_compile.codegen.cache import known_sha256
from lbllm_compile.codegen.errors import MissingPackageError, compiler_is_missing, missing_compiler
from lbllm_compile.codegen.progress import Progress
from lbllm_compile.codegen.targets import Target
from lbllm_compile.manifest import check_files
from lbllm_compile.native.language import LanguageModel
from lbllm_compile.native.program import find
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
        MissingPackageError: the artifact has to be prepared, and the extra ``compile`` is not installed.
    """
    chosen = Target.parse(target)
    program = find(directory, target, progress)
    if program is not None and program.description.plain_tokenizer:
        model = program.model(TextTokenizer(directory))
        if check is not None:
            check(model.tokenizer, model.config)
        return model
    try:
        # torch takes seconds to import
        from lbllm_compile import artifact
        from lbllm_compile.runtime.loader import prepared
    except ImportError as error:
        if not compiler_is_missing(error):
            raise
        check_files(directory, known_sha256)
        if program is not None:
            raise missing_compiler(error, f"the tokenizer of '{directory}'") from error
        chosen.check_runs_here()
        raise MissingPackageError(
            f"no program for {chosen.name} on this machine is stored for '{directory}', and making one needs the"
            " compiler; install it with `pip install 'lbllm-compile[compile]'`, or share the cache directory of an"
            " install that has it"
        ) from error

    loaded = artifact.load(directory)
    if check is not None:
        check(loaded.program.tokenizer, loaded.program.config)
    return prepared(loaded, target=target, progress=progress)
