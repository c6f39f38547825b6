"""The authors' architecture on a DINOv3 backbone, its weights, and the import of the authors' checkpoints."""
