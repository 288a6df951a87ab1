"""The report of `train-sae eval`: measured parts on disk, and a page made from them."""
