"""Programs that predict a latent's activation from tokens alone, and how well they do."""
