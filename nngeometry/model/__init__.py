"""How a model is looked at: what its data are, how it is run, recorded and kept as it was."""
