"""How good captions are, against references and without."""
