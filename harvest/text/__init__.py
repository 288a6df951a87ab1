"""Documents of a corpus: files, folders, buckets, the Hub, packaged news."""
