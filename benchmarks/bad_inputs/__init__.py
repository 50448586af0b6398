"""Runs the commands on malformed files, folders, configs, students, workdirs and weights."""
