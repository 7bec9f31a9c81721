"""How much memory requests need, before anything is loaded."""
