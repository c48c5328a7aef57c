"""The quantizer ``lbllm`` of transformers: what makes a compiled model of an original one while that is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lbllm_compile.manifest import QUANT_METHOD, is_artifact
from lbllm_compile.pretrained.errors import PretrainedError


@register_quantization_config(QUANT_METHOD)
class LbllmConfig(QuantizationConfigMixin):
    """What an artifact's configuration says of its quantization; the artifact itself knows the rest."""

    def __init__(self, quant_method: str = QUANT_METHOD, **_: Any):
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]


@register_quantizer(QUANT_METHOD)
class LbllmQuantizer(HfQuantizer):
    """Puts the artifact's runtime in the place of a model's layers, before transformers looks for their weights."""

    requires_calibration = True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
        if {str(device) for device in devices} - {"cpu", "auto"}:
            raise PretrainedError("compiled models run on CPUs; leave out device_map, or pass 'cpu'")

    def update_device_map(self, device_map: Any) -> Any:
        return None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32  # of the logits; the weights have their own

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin

        from lbllm_compile.pretrained.model import CompiledForCausalLM  # needs all of transformers' models

        wanted: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), GenerationMixin)
        if not isinstance(model, wanted):
            raise PretrainedError(
                f"a compiled model is a causal language model and cannot be a {type(model).__name__}; load it with"
                " AutoModelForCausalLM"
            )
        files = kwargs.get("checkpoint_files")
        self._directory = Path(files[0]).parent if files else Path(model.config.name_or_path)
        if not is_artifact(self._directory):
            raise PretrainedError(f"'{self._directory}' is not an lbllm artifact")
        CompiledForCausalLM.take_the_place_of(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from lbllm_compile.runtime import load

        # Only now: before, transformers makes new tensors on the meta device.
        compiled = load(self._directory)
        if not compiled.is_language_model:
            raise PretrainedError(f"'{self._directory}' is not a language model; use lbllm_compile.load()")
        model.attach(compiled)
        return model

    def is_serializable(self) -> bool:
        return False  # the artifact is the form it is stored in

    @property
    def is_trainable(self) -> bool:
        return False
