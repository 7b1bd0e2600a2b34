"""Fine-tuning: from pairs of pictures and captions to a model that captions. Never imports ray.

    archives.py   DATA, opened, listed and read
    pairs.py      what of it is usable, split by picture
    order.py      which pair is read when, and which of its captions is drawn
    collate.py    tables of pairs -> decoded pixels -> device batches
    loss.py       cross-entropy over caption tokens, for each family of models; GIT's layers in git_layers.py
    evaluate.py   WER of generated captions and loss on the eval set, summed over workers
    loop.py       what each worker does: transformers' Trainer with our loss and order
    callback.py   around its steps: evaluation, checkpoints, early stopping; tensorboard.py writes what was measured
    worker.py     what every worker knows of a run and must be able to do
    trainable.py  opening a model so that its weights can learn; lora.py its adapters
    job.py        a run from the first check to the finished model
    record.py     which run an OUT holds
    finish.py     the best checkpoint -> OUT/model, its card, history.json and report.html
    progress.py   how far it has come

`ray_jobs/train.py` runs the workers on Ray Train and the decoding on Ray Data.
"""
