"""Documents to tokens, contexts and inputs of shards."""
