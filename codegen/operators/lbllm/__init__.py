"""The project's own operators.

==========================  ===========================================================================================
``observe``                 identity; marks an input whose statistics a calibration pass wants
``unpack_weight``           W(1+1) planes and levels to a float matrix (simulation)
``unpack_rows``             int8-per-row matrix to float (simulation of embedding and lm_head)
``unpack_int4``             4-bit codes to float matrix (the same)
``fake_quantize``           quantize and dequantize activations (simulation)
``fake_quantize_kv``        quantize and dequantize keys or values per token and head (simulation)
``grouped_linear``          float linear over stacked experts, tokens sorted by expert
``quantize_activation``     float activations to integer values and scales
``bit_linear``              quantized activations times W(1+1) weights
``grouped_bit_linear``      the same for stacked experts, tokens sorted by expert
``int8_linear``             quantized activations times int8-per-row weights
``int8_embedding``          rows of an int8-per-row table
``int4_linear``             quantized activations times 4-bit weights
``int4_embedding``          rows of a 4-bit table
``attention``               attention with capped scores or sinks, which torch's own operator has not
``cached_attention``        attention over a quantized KV cache, which it updates
``cached_conv``             short causal convolution over tokens, whose last inputs it keeps
==========================  ===========================================================================================

Their eager implementation *is* the reference (:mod:`...reference`): slow and exact. A compiled model never runs it for
those that are kernels; its executor binds proven ones to those nodes instead.
"""

from . import activations, attention, convolution, embeddings, linears

__all__ = ["activations", "attention", "convolution", "embeddings", "linears"]
