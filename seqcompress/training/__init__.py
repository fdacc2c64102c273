"""What happens while a compressed encoder trains: its schedule, its cost and budget, its learning rate, its memory."""
