"""minBERT, the encoder over tensors in Hugging Face's layout. Installs as ``fastlora.bert``."""
