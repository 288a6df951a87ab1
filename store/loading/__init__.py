"""Shuffled batches: order, chunks, reading ahead, upload to a GPU."""
