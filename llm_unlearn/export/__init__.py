"""What serving stacks load, made from what a run serves."""
