"""From task files to batches: tasks, reading, tokens, their cache, batches, the demo corpus."""

from pathlib import Path

# It has made-up reviews, questions and captions in the CS224N files' format.
DEMO = Path(__file__).parent / "demo"
