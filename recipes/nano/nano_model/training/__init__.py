"""Training of the built-in model: a trainer of its own, because no layer changes the model's audio tokens.

`forward` runs text tokens only, against the keys and values of the audio in the cross layers; `parts` says what is
trained and how fast; `batches` draws the rows; `loop` trains, and goes on where it stopped.
"""
