"""`python -m fastlora.cli` is the `fastlora` command."""

from fastlora.cli import main

if __name__ == "__main__":
    main()
