"""Accelerates models of PEFT, transformers and sentence-transformers; no other room knows them."""
