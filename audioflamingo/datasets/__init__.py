"""Files of conversations about audio, read as rows: for training and evaluation."""
