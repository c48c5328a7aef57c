"""Artifacts as models of transformers: ``AutoModelForCausalLM.from_pretrained(DIR)`` after ``import lbllm_compile``.

An artifact's ``config.json`` is the original model's and names ``lbllm`` as its quantization method, which transformers
looks up among its quantizers. :mod:`.hook` makes it known there, :mod:`.quantizer` is what it finds, and what a user
gets is a :class:`.model.CompiledForCausalLM`: transformers' interface around the artifact's own runtime.
"""
