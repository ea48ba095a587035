"""Families as data: tables of key names and translations of one config into the five choices."""
