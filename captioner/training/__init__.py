"""Fine-tuning: from pairs of images and captions to a model that captions. Never imports ray.

    job.py            a run, from the first check to the finished model
    settings.py       which settings are refused before anything is read
    record.py         which run an OUT holds
    pair_sources.py   open, list and read DATA
    pairs.py          which pairs are usable, and their split into train, eval and test sets
    schedule.py       how many steps, when to evaluate and save
    worker.py         what a worker receives and must be able to do; local.py the engine without Ray
    loop.py           the training loop of a worker: transformers' Trainer with our loss and data order
    order.py          which pair is read at which step, with which of its captions
    collate.py        from pairs to decoded pixels to batches on a device
    trainable.py      open a model for training; lora.py its adapters
    loss.py           cross-entropy over caption tokens; git_layers.py GIT's layers for it
    callback.py       evaluation, early stopping and TensorBoard's figures
    checkpoints.py    checkpoints, written in a thread while training continues
    evaluate.py       WER of generated captions and loss on the eval set
    progress.py       the progress line
    finish.py         from the best checkpoint to OUT/model; hub.py its card and upload; report.py report.html

`ray_jobs/train.py` runs the workers on Ray Train and the decoding in Ray tasks.
"""
