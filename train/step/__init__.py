"""One training step: initial weights, objectives, AuxK, gradients, optimizer."""
