"""What is computed: tensors and files. Nothing here imports ray."""
