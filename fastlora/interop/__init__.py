"""Models of PEFT, transformers and sentence-transformers, accelerated in place.

Nothing below this room knows these libraries. Its public names are those of `fastlora` itself.
"""
