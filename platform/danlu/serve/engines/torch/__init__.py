"""Danlu's own language-model engine: continuous batching over the weights of any Hugging Face causal language model, on CPU or one GPU.

One request through the code: `engine.TorchEngine.generate` makes a `sequence.Sequence`; `scheduler.Scheduler` gives it a slot of the
key-value cache (`slots`, `cache`) and says which of its tokens the next step reads; `forward` or `fused` runs the step's tokens, of all
sequences, end to end (`attention`); `sampler` picks a token for each sequence that has been read to its end; `text` turns tokens into
text and watches for stop texts; the event loop is woken once with what the step has made.
"""
