"""An OpenAI-compatible server for a base and its adapters: continuous batches in which each row has its own adapter.

names.py      which adapters are served, and under which names
models.py     the base and its adapters, loaded once and compared with plain PEFT before the start
lane.py       rows that go through the model together: join, step, leave
engine.py     the thread that runs the lanes, its queue and its limits
sampling.py, text.py    the next token of a row; text of tokens, up to a stop string
schema.py, rendering.py, replies.py, errors.py    OpenAI's requests, prompts, replies and errors
app.py, metrics.py, server.py    the endpoints, what Prometheus reads, and the end on a signal
"""
