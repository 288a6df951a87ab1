"""Feature tables in the formats of other packages: docs/exports.md says what is written where."""
