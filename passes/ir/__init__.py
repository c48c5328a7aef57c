"""What passes work on: programs and where their tensors are, how graphs are walked, rewritten, written down and run."""
