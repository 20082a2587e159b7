"""One paper, one file: tensors in, tensors out."""
