"""What users of a trainer's framework write one line for. Each package imports its framework, and nothing else imports the package."""
