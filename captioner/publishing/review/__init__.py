"""A page on this machine where a person decides about each alt text.

    queue.py     which pictures, in what order; which have the same text
    rows.py      what is known of one picture
    decisions.py what was decided, by this reviewer and by others meanwhile
    session.py   what is shown, and what a decision does
    acceptance.py  how much is left, and how many alt texts are accepted as they stand
    previews.py  pictures of the archive as small JPEGs, never kept on the disk
    server.py    all of it over HTTP on 127.0.0.1, behind a token
    page.html    what the reviewer sees

The page's elements and keys, which tests and the screenshots rely on:

    keys       a or Enter accept, e edit, r reject, d decorative, s skip, x needs an expert, u undo, o only this one,
               ? help; while editing Ctrl+Enter saves and Esc cancels. Letters do nothing while a text is written, nor
               where "Single-key shortcuts" in the help is switched off
    buttons    "Accept", "Edit", "Reject", "Decorative", "Skip", "Needs an expert", "Undo", "Help"; "Save" and "Cancel"
               while editing; in a group one toggle button for each picture, "Only this one" and "All of them"
    #card      the picture under review: data-image-id, data-place; data-state "loading", "ready", "saving", "editing"
               or "done"; data-shown, which counts what was shown: it grows when a decision is on the disk and the next
               picture there; data-picture "loading", "shown" or "missing"
    #alt-text  the text as it stands; #editor the text field, labelled "Alt text"
    #status    role=status: says what happened ("Accepted.")
    #progress  reviewed and left; #acceptance the acceptance rate
"""
