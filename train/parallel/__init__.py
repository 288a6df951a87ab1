"""Training by several processes, under Ray or not."""
