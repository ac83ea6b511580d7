"""A language model that sees and hears, from Megatron-Core's parallel blocks.

The map of the package; imports point downwards only:

    train.py  avlm_inference.py  serve.py                what a user types
    evaluate.py  convert.py  prepare_data.py
    host/         lets the same commands run where CUDA is absent
    training/     flags, providers, forward step, loss, progress; encoders on ranks of their own
    planning/     what a layout costs: balanced stages, the pipeline as a timeline
    serving/      answers over HTTP
    inference/    prompt -> answer: an engine of rows, sampling, text, conversations
    checkpoint/   what a model is, written beside its weights; strict loading;
                  Hugging Face weights in and out
    models/       the parallel blocks: ViT, Whisper, projector, language model, MimoModel
    data/         files -> samples -> batches
    configs/      what a model is: schema.py, one file per model, a registry of names
"""
