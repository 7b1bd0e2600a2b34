"""Export reviewed texts to the formats that other programs read: one module for each format.

    read_texts -> select_texts -> tables of CHOSEN_SCHEMA -> write -> DEST

Every format is a `write` function with the same signature: it takes an iterator of tables of CHOSEN_SCHEMA and an
`Export`. Each table holds the texts of one part of the captions table, so memory does not grow with the number of
texts. A new DEST appears only when it is complete.
"""
