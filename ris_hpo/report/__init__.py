"""What is shown of a study: figures of a trial, the report, the study page."""
