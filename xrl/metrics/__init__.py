"""What a run measures: means that merge, files they are written to, lines a person reads."""
