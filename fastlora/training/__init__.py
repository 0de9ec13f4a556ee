"""The training loop and what it needs: configuration, checkpoints, processes, CUDA graphs."""
