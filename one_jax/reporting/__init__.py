"""Reporting: reads the files of runs; needs neither TFDS nor Flax."""
