"""The sparse autoencoder itself, its kernels and its formats; needs no trainer."""
