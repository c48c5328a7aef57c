"""What the calibrating passes share: layers as sub-graphs, activations in files, fitting and training."""
