"""What papers claim, tried at a size that two cores repeat in minutes: one file per paper, one command for all."""
