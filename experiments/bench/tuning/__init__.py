"""`expertier bench finetune`: steps of fine-tuning beside what their bytes would take on this disk."""
