"""Reading of the tables: SQL, results, a latent in the terminal."""
