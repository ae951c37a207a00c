"""Machinery that has never heard of the method: it imports nothing from the folder above.

    errors       what a person can mend, as one line          chance       randomness as a function, not a history
    images       where pictures come from, decoding           cache        a folder decoded once into one file
    data         batches, crops, loader, normalisation        flags        the command line that scripts share
    processes    launch, ranks, device, precision             optim        schedule, parameter groups, one step's parts
    loop         the training loop around those parts         checkpoints  files that are whole or not there
    runs         the run folder, resume, signals              probes       linear probe, k-NN, accuracy
    figures      curves, bars, a confusion matrix             timing       cases timed in turns, and their tables
"""
