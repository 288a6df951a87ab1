"""Moments and outlier rows of a shard; int8 quantisation."""
