"""Effects of ablating a latent on the logits of its token and of the tokens after it.

sample      rows of held-out documents, drawn with a seed, and latents that fire on them
changes     the vectors that an ablation subtracts from a context's rows
passes      the model's logits with and without these vectors
effects     one ablation's logits in a few numbers: KL, norms, the tokens that moved most
table       effects.parquet, and the parts that an interrupted run continues with
sparsity    the whole run over a sample
figures     ablation sparsity and the size of effects, with intervals
"""
