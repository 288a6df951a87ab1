"""Language models that explain and score: local ones, and any OpenAI-compatible endpoint."""
