"""The W(1+1)A4 format, the operators' exact definition, and generated kernels."""
