"""minBERT: the encoder over tensors, its configuration and weights, in Hugging Face's layout.

It installs as ``fastlora.bert``; import from its modules.
"""

if __name__ != "fastlora.bert":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package 'fastlora.bert': "
        "use 'from fastlora.bert...' and keep the repository root off sys.path "
        "(run 'pytest', not 'python -m pytest')"
    )
