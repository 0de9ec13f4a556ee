"""minBERT: the encoder, its configuration, weights and tokenizer, in Hugging Face's layout.

Installs as ``fastlora.bert``; import from its modules, e.g. ``fastlora.bert.weights``.
"""

if __name__ != "fastlora.bert":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package 'fastlora.bert': "
        "use 'from fastlora.bert...' and keep the repository root off sys.path "
        "(run 'pytest', not 'python -m pytest')"
    )
