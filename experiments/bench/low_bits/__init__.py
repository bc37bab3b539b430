"""`expertier bench low-bits`: what low-bit experts cost a model, beside llama.cpp's quantisers of the same model."""
