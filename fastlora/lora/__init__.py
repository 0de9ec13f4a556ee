"""The LoRA library: a layer, its injection into any model, merging, and adapters on disk.

It needs PyTorch and `fastlora.kernels`; nothing of it knows BERT, tasks or a command line. Its
public names are those of `fastlora` itself.
"""
