"""What is known of a run, its pictures and its page."""
