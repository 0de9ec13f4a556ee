"""Task files to batches: tasks, reading, tokens, the token cache, batches and the demo corpus."""

from pathlib import Path

# Made-up reviews, questions and captions in the CS224N files' format; bench/make_demo.py wrote it.
DEMO = Path(__file__).parent / "demo"
