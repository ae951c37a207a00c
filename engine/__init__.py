"""Machinery that has never heard of the method: it imports nothing from the folder above.

    errors       what a person can mend, as one line          chance       randomness as a function, not a history
    formats      channels, range, mean: values to numbers     decoding     a file of any kind becomes an image
    images       where pictures come from, crops              folders      data sets as people keep them
    cache        a folder decoded once into one file
    segmentation images with masks, measures of them          boxes        images with boxes, VOC and COCO
    data         batches, crops, loader, normalisation        flags        the command line that scripts share
    processes    launch, ranks, device, precision             optim        schedule, parameter groups, one step's parts
    loop         the training loop around those parts         checkpoints  files that are whole or not there
    runs         the run folder, resume, signals              probes       linear probe, k-NN, accuracy
    figures      curves, bars, a confusion matrix             report       a run on one page
    track        TensorBoard, Weights & Biases                timing       cases timed in turns, and their tables
"""
import os
import sys


def _end_in_one_line(kind, error, trace):
    """Ctrl-C while a program still imports torch: one line, as `processes.program` has it later."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{os.path.basename(sys.argv[0])}: error: stopped by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


if os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # one of our programs
    sys.excepthook = _end_in_one_line
