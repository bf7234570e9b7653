"""Fine-tuning of a Wan transformer: frozen backbone, LoRA, LoRA files, memory."""
