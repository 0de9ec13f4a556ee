"""A run folder, from its start to its report, and a finished run loaded back."""
