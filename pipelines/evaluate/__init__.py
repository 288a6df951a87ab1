"""How good a dictionary is, judged by the model it was trained on."""
