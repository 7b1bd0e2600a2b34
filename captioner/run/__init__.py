"""What one run on a table is made of: opening it, its record, which rows it works on."""
