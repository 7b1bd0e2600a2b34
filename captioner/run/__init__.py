"""One run on a table: opening it, its record, and which rows it works on."""
