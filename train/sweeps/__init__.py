"""Many runs on one stream of batches."""
