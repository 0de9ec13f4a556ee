"""The operation on a CPU (and wherever no Triton kernel runs): route "reference"."""
