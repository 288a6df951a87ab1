"""Stores made of known features, to judge dictionaries by what they should have learnt."""
