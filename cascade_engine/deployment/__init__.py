"""From a trained run to labels for videos: fine-tune, export one file, classify, embed, query, serve.

Loading and running an exported model needs `artefact`, `windows` and `predict` alone: no training code, no config.
"""
