"""Two dictionaries compared by the rows on which their latents fire.

common        the rows that both dictionaries read
spans         the firings of both on the same rows, some rows at a time
kernels       counts over these firings
joint         pairs of latents of which one lies in the other
sets          the latents of one dictionary that together explain a latent of the other
classes       same, split, merged, absorbed, born, died
disagreement  rows on which one latent of a pair fires and the other does not, with their text
table         matches.parquet, disagreements.parquet
diff          all of it, and the summary
"""
