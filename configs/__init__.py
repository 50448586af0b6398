"""Recipes, one a file; common.py holds the options they share."""
