"""One pass over a store: Parquet tables of every latent, SQL over them, a view of one latent."""
