"""Commands that change a model: `finetune`, and what it needs (`fit --finetune`)."""
