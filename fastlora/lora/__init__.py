"""The LoRA library: a layer, its injection into any model, merging, and adapters on disk.

It needs PyTorch and `fastlora.kernels`, and knows nothing of BERT, tasks or the command line. Its
public names are those of `fastlora` itself.
"""
