"""Audio Flamingo 3, exact and standalone."""
