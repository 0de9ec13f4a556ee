"""Models of PEFT, transformers and sentence-transformers, accelerated in place.

Only this package knows these libraries. Its public names are those of `fastlora` itself.
"""
