"""minBERT, the encoder over tensors in Hugging Face's layout. Installs as ``fastlora.bert``."""

if __name__ != "fastlora.bert":
    raise ImportError("import fastlora.bert instead (run 'pytest', not 'python -m pytest')")
