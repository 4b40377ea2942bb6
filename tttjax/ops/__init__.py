"""Array functions of the layers: a reference form of each, and fast forms."""
