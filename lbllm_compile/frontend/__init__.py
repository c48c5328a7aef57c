"""From what the user names to a :class:`Program`: a ``model.py``, a Hugging Face directory, a ``.gguf`` file, a hub id.

A ``model.py`` is Python and runs as such; what lies beside it can be imported meanwhile. It must define
``build_model() -> torch.nn.Module`` and may define

===========================  ==========================================================================================
``weights() -> path``        a ``.safetensors`` file or a directory of them, for a model built on the meta device
``tokenizer()``              a transformers tokenizer
``example_inputs()``         a tensor, tuple or dict to call the module with; needed by all but transformers language
                             models, and batched along the first dimension
``calibration_text()``       an iterable of strings to calibrate a language model with
``calibration_inputs()``     an iterable of inputs to calibrate any other module with
``recipe``                   a dict of compile options
===========================  ==========================================================================================

:func:`load` reads it into a :class:`UserModel`, and :func:`load_given` takes a model that is an object already;
:func:`capture` traces it with ``torch.export``. Nothing is downloaded unless the name is a hub id, and code that comes
with a model is never run.
"""

from lbllm_compile.frontend.loading import (
    HUB,
    UserModel,
    bind_inputs,
    clean_config,
    hub_id,
    load,
    load_directory,
    load_gguf,
    prepare,
)
from lbllm_compile.frontend.messages import CaptureError, ModelError
from lbllm_compile.frontend.objects import Given, attach, load_given
from lbllm_compile.frontend.tracing import LM_INPUTS, capture, language_model_inputs, program_hash, weights_hash

__all__ = [
    "HUB",
    "LM_INPUTS",
    "CaptureError",
    "Given",
    "ModelError",
    "UserModel",
    "attach",
    "bind_inputs",
    "capture",
    "clean_config",
    "program_hash",
    "hub_id",
    "language_model_inputs",
    "load",
    "load_directory",
    "load_gguf",
    "load_given",
    "prepare",
    "weights_hash",
]
