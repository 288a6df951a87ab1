"""Models, their weights, and the sites in them."""
