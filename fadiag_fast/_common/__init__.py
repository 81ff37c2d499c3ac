"""What every package uses and none of the field's words appear in: files, text, JSON, process."""
