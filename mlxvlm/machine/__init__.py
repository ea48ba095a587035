"""This computer: its limits."""
