"""Screening: one task on thousands of structures, by processes of this machine or jobs of Slurm, into one SQLite file."""
