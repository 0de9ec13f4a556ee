"""The LoRA library, for any PyTorch model; its public names are those of `fastlora` itself."""
