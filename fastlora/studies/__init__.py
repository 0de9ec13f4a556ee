"""Series of runs: the search of LoRA settings, and the tables of the paper."""
