"""The paper's model: one encoder, a head for each task, their scores and their files."""
