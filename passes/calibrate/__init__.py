"""What the calibrating passes share: layers as sub-graphs, streamed activations, fitting and training."""
