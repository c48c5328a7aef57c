"""What goes wrong with artifacts as models of transformers."""

from lbllm_compile.codegen.errors import LbllmError


class PretrainedError(LbllmError):
    """A compiled model is asked for what it cannot do as a model of transformers."""
