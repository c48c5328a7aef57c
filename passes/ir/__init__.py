"""What passes work on: programs, how their graphs are walked, rewritten, written down and run exactly."""
