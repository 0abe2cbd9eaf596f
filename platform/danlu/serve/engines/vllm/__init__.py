"""vLLM as an engine: its own server as a child process, spoken to in token ids over a Unix socket.

Why a child and not vLLM's AsyncLLM in the replica: vLLM pins its own torch, transformers and fastapi, so it has an environment of its
own; its completions API has kept its shape over many releases where its classes have not; and a GPU fault then ends the child and not
the replica, which tells its clients, turns its health red and is replaced. What a request pays is a hop over a socket in memory.

The gateway stays in front, and with it keys, limits, metrics, tools and the chat template: prompts arrive here as token ids, made by
the same reader as for Danlu's own engine, and vLLM is asked with these ids and answers with ids, text and log probabilities. It listens
on a socket in a private folder: nobody else on the machine can talk to it.

One request through the code: `engine.VllmEngine.generate` reads it (`model`), `wire` makes vLLM's body of it and deltas of its events;
`command` is how vLLM is started, `child` and `keeper` the process's life, `adapters` what it is told of LoRA, `probes` the check that it
answers as the bundle was evaluated.
"""
