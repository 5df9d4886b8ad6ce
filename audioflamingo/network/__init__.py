"""The network and nothing else: attention and its cache, encoder, projector, language model, and the three joined."""
