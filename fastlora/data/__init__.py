"""Task files to batches: tasks, reading, tokens, the token cache, batches and the demo corpus."""
