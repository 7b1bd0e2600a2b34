"""What people see on the terminal, and the commands that only look at a table."""
