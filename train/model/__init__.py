"""The decoder, its attention, and the precision that both compute in."""
