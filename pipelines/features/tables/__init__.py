"""The Parquet tables: schemas, writers, contexts, checks."""
