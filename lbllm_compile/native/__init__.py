"""Running what was prepared: stored programs, sampling, prompts and text. Needs neither torch nor TVM's compiler."""
