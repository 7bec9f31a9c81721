"""What was kept of a prompt, to look at: a web component, and a page that holds it with its data."""
