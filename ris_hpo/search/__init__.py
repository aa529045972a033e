"""What is searched: study files, specifications, samplers, pruners, and the exact count of trials."""
