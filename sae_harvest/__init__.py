"""Any open language model as a searchable table of concepts."""
