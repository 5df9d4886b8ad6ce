"""Whisper's decoder inside Audio Flamingo 3's architecture: the construction of the built-in model, part by part.

| module | what it makes | exact |
|---|---|---|
| `layout` | which dimension of the stream and of a head holds what | |
| `masks` | who looks at whom, by kind of token | to exp(-margin) |
| `attention` | Whisper's attention with heads of fewer directions, its norms folded in | to the directions left out |
| `mlp` | SwiGLU in place of GELU, fitted | to about 1 % |
| `positions` | layer 0: Whisper's positions, and what is a transcript, out of rotary attention | to about 0.1 % |
| `vocabulary` | Whisper's tokens, cut down | |
| `words` | whole words added to them | |
| `assemble` | embeddings, output rows, projector, the folder | |
"""
