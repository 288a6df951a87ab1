"""Views of a store: summary, origin of a row, export."""
