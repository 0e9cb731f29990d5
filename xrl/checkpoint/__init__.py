"""A run's state on disk: what it needs to go on as if it had never been interrupted.

    <run>/state/step-40/
        manifest.json                         what the others are, and everything small; written last
        t0-p1-d0.safetensors                  a file a rank: main weights and moments that no other rank has written
        lead.safetensors                      answers in progress, and other arrays of rank 0's

manifest.py  what is written in words and numbers, and which of the folders is whole; no torch
pieces.py    which rank writes which elements of which parameter
reader.py    any rows of any tensor, out of the files of whatever layout wrote them
writer.py    snapshots, written while the training goes on
changes.py   what differs between the run that saved and the one that goes on; no torch
"""
