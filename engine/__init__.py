"""What makes a training run survive: it knows neither the method nor the programs, and imports nothing from the top
level.

errors       user errors and warnings, each one line      rng          random numbers as a function of seed and purpose
files        files written completely or not at all       dist         processes, device and precision
data         crops, batches and the data loader           flags        the command line that programs share
optim        schedule, parameter groups, training step    loop         the training loop around that step
checkpoints  checkpoints, and weights of any origin       runs         the run folder, resume, signals
probes       linear probe, k-NN, accuracy, mean IoU       plots        curves, bars, a confusion matrix
report       a run on one page                            track        TensorBoard, Weights & Biases
timing       cases timed in turns, and their tables
"""

VERSION = "0.9.0"
