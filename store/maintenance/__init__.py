"""Verification, repair and merging of stores."""
