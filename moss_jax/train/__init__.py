"""Training: which parameters a stage trains, where they come from, the losses, the step and the loop around it."""
