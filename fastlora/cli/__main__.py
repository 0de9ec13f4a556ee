"""`python -m fastlora.cli` is the `fastlora` command."""

import os
import sys

if __name__ == "__main__":
    # Python puts the current folder first. In a checkout it holds kernels/, which transformers
    # would take for Hugging Face's package of that name.
    if sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
    from fastlora.cli import main

    main()
