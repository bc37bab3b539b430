"""What every package stands on, without torch: whole files, the C compiler, sizes, hardware rates, expectations."""
