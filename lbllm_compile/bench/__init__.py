"""``lbllm-compile bench``: how fast an artifact is here, and what it is compared with, in turns.

=====================  ========================================================================
:mod:`.turns`          what is compared takes turns; medians and quartiles
:mod:`.decoders`       language models that decode, each in a process of its own
:mod:`.decoding`       their loading, memory, decoding and prefill
:mod:`.linears`        the distinct linears of an artifact, one by one
:mod:`.command`        the whole of it
=====================  ========================================================================

Nothing here imports torch before it is needed: the memory of a process is that of what it runs.
"""
