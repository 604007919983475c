"""What looks at results: scores and pictures."""
