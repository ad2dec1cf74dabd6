"""Training: a config of phases, a short loop, run folders that continue after any interruption."""
