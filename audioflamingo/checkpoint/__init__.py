"""From a folder to weights in a model, and back.

weights (names of every layout, strict) -> device_map (where to) -> loading, quantizing -> pretrained (the model);
saving writes a folder that an interruption cannot spoil.
"""
