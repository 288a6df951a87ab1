"""The tables read: SQL, results, a latent in the terminal."""
