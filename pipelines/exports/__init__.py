"""Feature tables in the formats of other packages; docs/exports.md lists the files."""
