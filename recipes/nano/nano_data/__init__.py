"""Data of the built-in model: text, speech, sounds, instruments and conversations, made from packages.

Nothing here is imported by the `audioflamingo` package. Modules import their heavy dependencies (speech
engines, audio libraries) inside the functions that use them, so that the pure parts can be tested anywhere.
"""
