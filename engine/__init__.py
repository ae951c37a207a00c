"""Machinery that has never heard of the method: it imports nothing from the folder above.

errors       what a person can mend, as one line          chance       randomness as a function, not a history
formats      channels, range, mean: values to numbers     decoding     a file of any kind becomes an image
images       where pictures come from, crops              folders      data sets as people keep them
cache        a folder decoded once into one file
segmentation images with masks, measures of them
data         batches, crops, loader, normalisation        flags        the command line that scripts share
processes    launch, ranks, device, precision             optim        schedule, parameter groups, one step's parts
loop         the training loop around those parts         checkpoints  files that are whole or not there
runs         the run folder, resume, signals              probes       linear probe, k-NN, accuracy
figures      curves, bars, a confusion matrix             report       a run on one page
track        TensorBoard, Weights & Biases                timing       cases timed in turns, and their tables
"""

VERSION = "0.9.0"
